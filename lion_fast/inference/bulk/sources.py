"""The inputs of a bulk job: pictures, each with an id that stays the same, read one by one in any order."""

import glob
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lion_fast.data.records import describe
from lion_fast.inference.bulk.job import BulkJob
from lion_fast.io.images import image_suffixes

_KINDS = (".jsonl", ".parquet", ".tar")


@dataclass(frozen=True)
class Item:
    """One input.

    Args:
        image: the picture's file or its content.
        name: of the picture as the input has it; None for content without one.
        text: question or expression; None where one stands for all.
        tags: one string per tag, or as LION writes them; None where there are none.
    """

    image: Path | bytes
    name: str | None
    text: str | None = None
    tags: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the fields that are read; `text` and `tags` are None where they are not."""

    image: str
    text: str | None
    tags: str | None

    @classmethod
    def of(cls, job: BulkJob) -> "Columns":
        asks = job.definition.asks
        return cls(
            image=job.columns.get("image", "image"),
            text=None if asks is None or job.text is not None else job.columns.get(asks, asks),
            tags=None if job.command == "tag" or job.tags is not None else job.columns.get("tags", "tags"),
        )

    def text_of(self, fields: Mapping[str, Any]) -> str | None:
        """Raises ValueError for anything but words."""
        if self.text is None:
            return None
        if self.text not in fields:
            raise ValueError(f"{self.text}: missing")
        text = fields[self.text]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{self.text}: expected text, got {describe(text)}")
        return text

    def tags_of(self, fields: Mapping[str, Any]) -> str | tuple[str, ...] | None:
        """Raises ValueError for anything but text, a list of texts or nothing."""
        tags = None if self.tags is None else fields.get(self.tags)
        if tags is None or isinstance(tags, str):
            return tags
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ValueError(f"{self.tags}: expected text or a list of texts, got {describe(tags)}")
        return tuple(tags)

    def length(self, fields: Mapping[str, Any]) -> int:
        """Characters of what differs by input in what LION reads; 0 for what cannot be read."""
        try:
            text, tags = self.text_of(fields), self.tags_of(fields)
        except ValueError:
            return 0
        return len(text or "") + (len(tags) if isinstance(tags, str) else sum(len(tag) + 2 for tag in tags or ()))


class Source(ABC):
    """Inputs by position. It is pickled to wherever inputs are read.

    Args:
        columns: what is read of each.
        lengths: int32 [n], characters of text, by which batches are made.
        files: [name, bytes] of files whose change would change the ids; recorded with the job.
    """

    def __init__(self, columns: Columns, lengths: Sequence[int] | np.ndarray, files: list[list]):
        self.columns = columns
        self.lengths = np.asarray(lengths, np.int32)
        self.files = files

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def id(self, index: int) -> str:
        """What names the input in the output, the same in every run."""

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Raises ValueError or OSError for an input that is not as it should be."""


class PictureSource(Source):
    """Files that are pictures; their ids are their names.

    Args:
        files: name and path of each.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]]):
        if columns.text is not None:
            raise ValueError(
                f"{columns.text}: expected one for all pictures, as files have none of their own, got none"
            )
        super().__init__(columns, np.zeros(len(files)), [])
        self._pictures = files

    def id(self, index: int) -> str:
        return printable(self._pictures[index][0])

    def __getitem__(self, index: int) -> Item:
        name, path = self._pictures[index]
        return Item(path, printable(name))


def open_source(job: BulkJob) -> Source:
    """A job's inputs.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: files of several kinds, or files that cannot be read as what their name says.
    """
    from lion_fast.inference.bulk.shards import ShardSource
    from lion_fast.inference.bulk.tables import JsonlSource, ParquetSource

    files, columns = find_files(job.input), Columns.of(job)
    image_root = None if job.image_root is None else Path(job.image_root)
    kinds = {path.suffix.lower() if path.suffix.lower() in _KINDS else "pictures" for _, path in files}
    if len(kinds) > 1:
        raise ValueError(f"input: expected files of one kind, got {', '.join(sorted(kinds))} in {job.input}")
    (kind,) = kinds
    if kind == ".jsonl":
        return JsonlSource(columns, files, image_root)
    if kind == ".parquet":
        return ParquetSource(columns, files, image_root)
    if kind == ".tar":
        return ShardSource(columns, files)
    return PictureSource(columns, files)


def find_files(input: str) -> list[tuple[str, Path]]:
    """The files that `BulkJob.input` stands for, sorted, each with the name that its ids begin with.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(input)
    if path.is_file():
        return [(path.name if path.suffix.lower() in _KINDS else input, path)]
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        found = [(shard.name, shard) for shard in shards] or sorted(_pictures_below(path))
        if not found:
            raise FileNotFoundError(f"input: expected pictures (or .tar files) in the folder {path}, found none")
        return found
    matched = sorted(name for name in glob.glob(input, recursive=True) if os.path.isfile(name))
    if not matched:
        raise FileNotFoundError(f"input: expected a file, a folder, or a pattern of files that are there, got {input}")
    return [(name, Path(name)) for name in matched]


def _pictures_below(folder: Path) -> Iterator[tuple[str, Path]]:
    suffixes = image_suffixes()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in suffixes and not name.startswith("."):
                yield path.relative_to(folder).as_posix(), path


class Positions:
    """Where inputs lie, one row of integers each, in a few bytes."""

    def __init__(self, width: int):
        self._width = width
        self._values = array("q")

    def add(self, *values: int) -> None:
        self._values.extend(values)

    def array(self) -> np.ndarray:
        """int64 [n, width]."""
        return np.frombuffer(self._values, np.int64).reshape(-1, self._width)


def sized(files: Sequence[tuple[str, Path]]) -> list[list]:
    return [[printable(name), path.stat().st_size] for name, path in files]


def printable(text: str) -> str:
    """Text that UTF-8 can hold: file names may be any bytes, of which Python makes half surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
