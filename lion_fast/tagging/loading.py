"""Loading of a tagger for the commands."""

from pathlib import Path
from typing import Any

import torch

from lion_fast.io.checkpoints import naming
from lion_fast.tagging.modeling_ram import RamTagger


def load_tagger(directory: Path, device: torch.device | str) -> RamTagger:
    """Load a `RamTagger` in float32, whatever its file's dtype.

    Its thresholds are for probabilities in float32: in half precision, an image near a threshold would get other tags.

    Raises:
        CheckpointError: the directory is no `RamTagger`.
        OSError: there is no such directory.
    """
    with naming(directory, "a directory with a RamTagger"):
        tagger: Any = RamTagger.from_pretrained(directory, dtype=torch.float32)
    return tagger.to(device).eval()
