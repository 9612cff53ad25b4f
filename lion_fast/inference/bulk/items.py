"""Base of all inputs of a bulk job: items with ids, and the fields read from them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
        image: path or content of the image file.
        name: name of the image in the input; None for content without a name.
        text: question or expression; None if all inputs have the same.
        tags: one string per tag, or all tags in one string; None for no tags.
    """

    image: Path | bytes
    name: str | None
    text: str | None = None
    tags: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the fields to read; `text`, `tags` and `id` are None if they are not read.

    Args:
        needs_id: whether every row of a table must have an id, because the job names its field.
    """

    image: str
    text: str | None
    tags: str | None
    id: str | None = None
    needs_id: bool = False

    @classmethod
    def of(cls, job: BulkJob) -> "Columns":
        asks = job.definition.asks
        return cls(
            image=job.columns.get("image", "image"),
            text=None if asks is None or job.text is not None else job.columns.get(asks, asks),
            tags=None if job.command == "tag" or job.tags is not None else job.columns.get("tags", "tags"),
            id=job.columns.get("id", "id") or None,
            needs_id=bool(job.columns.get("id")),
        )

    def id_of(self, fields: Mapping[str, Any]) -> str | int | None:
        """Return the own id of a table's row, or None if it has none.

        Raises:
            ValueError: the id is neither text nor a whole number, or is missing although the job names its field.
        """
        id = None if self.id is None else fields.get(self.id)
        if id is None:
            if self.needs_id:
                raise ValueError(f"{self.id}: missing")
            return None
        if isinstance(id, bool) or not isinstance(id, str | int) or (isinstance(id, str) and not id.strip()):
            raise ValueError(f"{self.id}: expected text or a whole number, got {describe(id)}")
        if printable(str(id)) != str(id):
            raise ValueError(f"{self.id}: expected text that UTF-8 can hold, got half a surrogate pair")
        return id

    def text_of(self, fields: Mapping[str, Any]) -> str | None:
        """Return the text of an input, or None if it is not read.

        Raises:
            ValueError: the text is missing, blank or not a string.
        """
        if self.text is None:
            return None
        if self.text not in fields:
            raise ValueError(f"{self.text}: missing")
        text = fields[self.text]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{self.text}: expected text, got {describe(text)}")
        return text

    def tags_of(self, fields: Mapping[str, Any]) -> str | tuple[str, ...] | None:
        """Return the tags of an input, or None if they are not read or absent.

        Raises:
            ValueError: the tags are neither a string nor a list of strings.
        """
        tags = None if self.tags is None else fields.get(self.tags)
        if tags is None or isinstance(tags, str):
            return tags
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ValueError(f"{self.tags}: expected text or a list of texts, got {describe(tags)}")
        return tuple(tags)

    def length(self, fields: Mapping[str, Any]) -> int:
        """Return the number of characters of an input's own text and tags; 0 if they are invalid."""
        try:
            text, tags = self.text_of(fields), self.tags_of(fields)
        except ValueError:
            return 0
        return len(text or "") + (len(tags) if isinstance(tags, str) else sum(len(tag) + 2 for tag in tags or ()))


class Source(ABC):
    """Inputs with random access. A source is pickled to the workers.

    Args:
        columns: fields to read from each input.
        lengths: int32 [n], characters of text, by which batches are grouped.
        files: [name, bytes] of files whose change would change the ids; recorded with the job.

    Attributes:
        own_ids: whether ids are read from a field of the input.
        tables: files of an input that is not images.
    """

    own_ids = False
    tables: Sequence[Path] = ()

    def __init__(self, columns: Columns, lengths: Sequence[int] | np.ndarray, files: list[list]):
        self.columns = columns
        self.lengths = np.asarray(lengths, np.int32)
        self.files = files

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def id(self, index: int) -> str | int:
        """Return the id of the input in the output, the same in every run."""

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Read an input.

        Raises:
            ValueError: the input is invalid, or its part of a file cannot be read.
            OSError: a file of many inputs cannot be read, or has been truncated.
        """


class Ids:
    """The ids of the rows of tables or of the members of shards: their own where they have one, else their place.

    Args:
        columns: fields to read from each row.
    """

    def __init__(self, columns: Columns):
        self.columns = columns
        self.own: dict[int, str | int] = {}  # index -> id, for the rows that have one

    def add(self, index: int, fields: Mapping[str, Any]) -> None:
        """Read the id of a row; one that is invalid is an error of the row."""
        try:
            id = self.columns.id_of(fields)
        except ValueError:
            return
        if id is not None:
            self.own[index] = id

    def expect_unique(self, count: int, place: Callable[[int], str]) -> None:
        """Check the ids of `count` rows, whose places are also the ids of those without one.

        Raises:
            ValueError: two rows have the same id; the message names both.
        """
        if not self.own:
            return
        seen: dict[str, int] = {}
        for index in range(count):
            id = str(self.own.get(index, place(index)))
            if (other := seen.setdefault(id, index)) != index:
                raise ValueError(
                    f"{place(other)} and {place(index)}: expected different ids, got {id!r} twice "
                    "(--column id=NAME reads them from another field, --column id= numbers the rows)"
                )


def sized(files: Sequence[tuple[str, Path]]) -> list[list]:
    return [[printable(name), path.stat().st_size] for name, path in files]


def printable(text: str) -> str:
    """Escape the lone surrogates with which Python represents bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
