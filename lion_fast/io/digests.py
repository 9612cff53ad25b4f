"""Digests of files, which show whether their content has changed.

Files that can be larger than memory, such as shards and weights, are hashed at evenly spaced blocks: other weights or a
rewritten shard differ there or in size, but a small edit in place need not. Other files are hashed whole.
"""

import hashlib
from pathlib import Path

from lion_fast.io.reading import opened

SAMPLED = (".tar", ".parquet", ".safetensors", ".bin", ".pth", ".pt")
_BLOCK, _BLOCKS = 4096, 256


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file's size and content, or of blocks of it.

    Raises:
        OSError: it cannot be read.
    """
    with opened(file) as content:
        digest, size = hashlib.sha256(), file.stat().st_size
        digest.update(f"{size} ".encode())
        if file.suffix not in SAMPLED or size <= _BLOCK * _BLOCKS:
            while block := content.read(1 << 20):
                digest.update(block)
        else:
            for number in range(_BLOCKS):
                content.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()
