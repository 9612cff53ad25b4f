"""What every kind of input of a bulk job has: items by position, their ids, and the fields that are read of them."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lion_fast.data.records import describe
from lion_fast.inference.bulk.job import BulkJob


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
