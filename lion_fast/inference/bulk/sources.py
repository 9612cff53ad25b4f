"""The inputs of a bulk job: images with stable ids and random access."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lion_fast.inference.bulk.items import Columns, Item, Source, printable
from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.shards import ShardSource
from lion_fast.inference.bulk.tables import JsonlSource, ParquetSource
from lion_fast.io.images import image_suffixes

_KINDS = (".jsonl", ".parquet", ".tar")


class ImageSource(Source):
    """Source of image files; their ids are their names.

    Args:
        files: name and path of each file.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]]):
        if columns.text is not None:
            raise ValueError(
                f"{columns.text}: expected one for all images, because image files have none of their own, got none"
            )
        super().__init__(columns, np.zeros(len(files)), [])
        self._images = files

    def id(self, index: int) -> str:
        return printable(self._images[index][0])

    def __getitem__(self, index: int) -> Item:
        name, path = self._images[index]
        return Item(path, printable(name))


def open_source(job: BulkJob) -> Source:
    """Open a job's inputs.

    Raises:
        FileNotFoundError: no input file exists.
        ValueError: the files are of several kinds, or cannot be read as the kind of their suffix.
    """
    files, columns = find_files(job.input), Columns.of(job)
    image_root = None if job.image_root is None else Path(job.image_root)
    kinds = {path.suffix.lower() if path.suffix.lower() in _KINDS else "images" for _, path in files}
    if len(kinds) > 1:
        raise ValueError(f"input: expected files of one kind, got {', '.join(sorted(kinds))} in {job.input}")
    (kind,) = kinds
    if kind == ".jsonl":
        return JsonlSource(columns, files, image_root)
    if kind == ".parquet":
        return ParquetSource(columns, files, image_root)
    if kind == ".tar":
        return ShardSource(columns, files)
    return ImageSource(columns, files)


def find_files(input: str) -> list[tuple[str, Path]]:
    """Return the files of `BulkJob.input`, sorted, each with the name that its ids start with.

    Raises:
        FileNotFoundError: no file is found.
    """
    path = Path(input)
    if path.is_file():
        return [(path.name if path.suffix.lower() in _KINDS else input, path)]
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        found = [(shard.name, shard) for shard in shards] or sorted(_images_below(path))
        if not found:
            raise FileNotFoundError(f"input: expected images (or .tar files) in the directory {path}, found none")
        return found
    matched = sorted(name for name in glob.glob(input, recursive=True) if os.path.isfile(name))
    if not matched:
        raise FileNotFoundError(f"input: expected a file, a directory, or a pattern that matches files, got {input}")
    return [(name, Path(name)) for name in matched]


def _images_below(directory: Path) -> Iterator[tuple[str, Path]]:
    suffixes = image_suffixes()
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in suffixes and not name.startswith("."):
                yield path.relative_to(directory).as_posix(), path
