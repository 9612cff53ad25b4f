"""The index of a directory of shards, `index.npz`: which bytes of which tar file each sample consists of.

An index may come from anywhere, so all of it is checked before any shard is read: it names only files of its own
directory, and only bytes that lie inside them and belong to one image each.

The archive holds four arrays: `version`, an integer; `names` of the shards; `sizes`, int64, their bytes; and `rows`,
int64 [n, 8], one row per sample in the order of the shards: number of the shard, start and size of the image, start and
size of the image's records, number of the record among them, index of its task in `TASKS`, and length of its text.
"""

import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lion_fast.data.records import DataError
from lion_fast.io.atomic import whole_file
from lion_fast.io.reading import naming, shown
from lion_fast.tasks import TASKS

INDEX = "index.npz"
BLOCK = 512
"""Bytes of a tar file's header; every member starts at a multiple of it."""

_VERSION = 1
_MEMBER_BYTES = 1 << 30  # of an image or its records; an image within the limit of pixels takes less
_LENGTH = np.iinfo(np.int32).max


def write_index(directory: Path, shards: Sequence[Path], rows: Sequence[Sequence[int]]) -> None:
    names, sizes = [shard.name for shard in shards], [shard.stat().st_size for shard in shards]
    with whole_file(directory / INDEX) as unfinished, unfinished.open("wb") as file:
        np.savez(file, version=_VERSION, names=names, sizes=sizes, rows=np.array(rows, np.int64))


def read_index(directory: Path) -> tuple[list[Path], list[int], np.ndarray]:
    """Return the paths of the shards, their sizes in bytes, and the rows.

    Raises:
        FileNotFoundError: the directory has no index.
        DataError: the index cannot be read, names files outside its directory or bytes outside its files, contradicts
            itself, or a shard is missing or has another size.
    """
    path = directory / INDEX
    if not os.path.isfile(path):
        raise FileNotFoundError(f"directory: expected shards and their {INDEX}, found none in {directory}")
    with naming(path, "an index of shards", DataError):
        version, names, sizes, rows = _arrays(path)
    if version.shape != () or int(version) != _VERSION:
        raise DataError(f"{path}: expected an index of version {_VERSION}, got version {shown(version.tolist())}")
    shards = [directory / _checked_name(path, name) for name in names.tolist()]
    if len(sizes) != len(shards) or len(set(shards)) != len(shards):
        raise DataError(f"{path}: expected one size for each of {len(shards)} different names, got {len(sizes)}")
    for shard, size in zip(shards, sizes.tolist(), strict=True):
        found = shard.stat().st_size if os.path.isfile(shard) else 0
        if found != size:
            raise DataError(f"{shard}: expected {size} bytes, as in {INDEX}, got {found}")
    _check_rows(path, rows, sizes)
    return shards, sizes.tolist(), rows


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        return (
            _array(archive, "version", "iu", 0),
            _array(archive, "names", "U", 1),
            _array(archive, "sizes", "i", 1),
            _array(archive, "rows", "i", 2),
        )


def _array(archive: zipfile.ZipFile, name: str, kinds: str, ndim: int) -> np.ndarray:
    """Read an array whose bytes are in the file as they are: neither its header nor compression can make it larger."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name}: expected an array that is not compressed")
    content = archive.read(info)
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind not in kinds or (dtype.kind == "i" and dtype != np.int64):
        raise ValueError(f"{name}: unexpected dtype {dtype}")
    if len(shape) != ndim or (fortran_order and ndim > 1):
        raise ValueError(f"{name}: unexpected shape {shown(shape)}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{name}: shape {shown(shape)} does not match {len(content) - file.tell()} bytes")
    if dtype.itemsize == 0:
        raise ValueError(f"{name}: unexpected dtype {dtype}")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


def _checked_name(path: Path, name: str) -> str:
    if name != Path(name).name or "\\" in name or not name.isprintable() or not name.endswith(".tar"):
        raise DataError(f"{path}: expected names of .tar files beside it, got {shown(name)}")
    return name


def _check_rows(path: Path, rows: np.ndarray, sizes: np.ndarray) -> None:
    if rows.shape[1] != 8:
        raise DataError(f"{path}: expected rows of 8 numbers, got {rows.shape[1]}")
    if not len(rows):
        raise DataError(f"{path}: holds no sample")
    shard, image, image_size, text, text_size, number, task, length = rows.T

    def check(name: str, good: np.ndarray) -> None:
        if not good.all():
            raise DataError(f"{path}: {name}, got {rows[int(np.argmin(good))].tolist()} in a row of it")

    def within(values: np.ndarray, low: int, high: int | np.ndarray) -> np.ndarray:
        return (values >= low) & (values <= high)

    check(f"expected one of {len(sizes)} shards", within(shard, 0, len(sizes) - 1))
    for name, start, size in (("image", image, image_size), ("records", text, text_size)):
        check(f"expected 1 to {_MEMBER_BYTES} bytes of {name}", within(size, 1, _MEMBER_BYTES))
        check(f"expected {name} at a block of a tar file", within(start, BLOCK, sizes[shard]) & (start % BLOCK == 0))
        check(f"expected {name} inside the shard", size <= sizes[shard] - start)
    check("expected the records behind their image", text >= image + image_size + BLOCK)
    check("expected the number of a record", within(number, 0, _MEMBER_BYTES))
    check("expected the number of a task", within(task, 0, len(TASKS) - 1))
    check("expected the length of a text", within(length, 0, _LENGTH))
    # In the order of writing, each row is another record of the previous row's image, or of an image behind it.
    same = np.append(False, (rows[1:, :5] == rows[:-1, :5]).all(axis=1))
    later = np.append(True, (shard[1:] > shard[:-1]) | (image[1:] >= (text + text_size)[:-1] + BLOCK))
    check("expected the shards in order", np.append(True, np.diff(shard) >= 0))
    check("expected images that do not overlap", same | later)
    check("expected the records of an image in order", number == np.where(same, np.append(0, number[:-1] + 1), 0))
