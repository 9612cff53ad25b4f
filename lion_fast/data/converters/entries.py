"""What converters read and return.

Entries are JSON values with their path, for messages: `captions.json: annotations[3].caption: expected text, got null`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lion_fast.data.records import DataError, Record, describe


class Entry:
    """A JSON value with its file and path; access to a value of the wrong type raises a `DataError` that names both.

    Args:
        value: value from `json.loads`.
        file: file of the value.
        path: path of the value in the file, such as `annotations[3].caption`.
        name: name of the field, for a value of an object.
    """

    __slots__ = ("file", "name", "path", "value")

    def __init__(self, value: Any, file: Path, path: str = "", name: str = ""):
        self.value = value
        self.file = file
        self.path = path
        self.name = name

    @property
    def place(self) -> str:
        return f"{self.file}: {self.path}" if self.path else str(self.file)

    def __contains__(self, name: str) -> bool:
        """Return whether the value is an object with this field."""
        return isinstance(self.value, dict) and name in self.value

    def __getitem__(self, name: str) -> "Entry":
        """Return a field of an object."""
        if not isinstance(self.value, dict):
            raise self.error("an object")
        if name not in self.value:
            raise DataError(f"{self._field(name).place}: missing")
        return self._field(name)

    def fields(self) -> Iterator["Entry"]:
        """Return an iterator over all fields of an object."""
        if not isinstance(self.value, dict):
            raise self.error("an object")
        return map(self._field, self.value)

    def __iter__(self) -> Iterator["Entry"]:
        """Return an iterator over the items of a list."""
        if not isinstance(self.value, list):
            raise self.error("a list")
        return (Entry(item, self.file, f"{self.path}[{i}]") for i, item in enumerate(self.value))

    def text(self) -> str:
        """Return text stripped, with each run of white space replaced by one space."""
        text = " ".join(self.value.split()) if isinstance(self.value, str) else ""
        if not text:
            raise self.error("text")
        return text

    def integer(self) -> int:
        """Return an integer, also if it is written as text."""
        number = int(self.value) if isinstance(self.value, str) and self.value.isdecimal() else self.value
        if not isinstance(number, int) or isinstance(number, bool):
            raise self.error("a whole number")
        return number

    def number(self) -> float:
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            raise self.error("a number")
        return self.value

    def key(self) -> str:
        """Return the identifier of an entry, a number or text, as text."""
        return self.text() if isinstance(self.value, str) else str(self.integer())

    def error(self, expected: str, got: str | None = None) -> DataError:
        return DataError(f"{self.place}: expected {expected}, got {describe(self.value) if got is None else got}")

    def _field(self, name: str) -> "Entry":
        path = f"{self.path}.{name}" if self.path else name
        return Entry(self.value.get(name), self.file, path, name)


def load_json(path: Path) -> Entry:
    """Load a JSON file.

    Raises:
        DataError: the file is not JSON.
        OSError: the file cannot be read.
    """
    try:
        return Entry(json.loads(path.read_bytes()), path)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({' '.join(str(error).split())[:200]})") from error


def load_lines(path: Path) -> list[Entry]:
    """Load the non-blank lines of a text file.

    Raises:
        DataError: the file is not UTF-8.
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeError as error:
        raise DataError(f"{path}: not text in UTF-8 ({error})") from error
    return [Entry(line, path, f"line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def index_by(entries: Iterable[Entry], field: str) -> dict[str, Entry]:
    """Index entries by the field that identifies them."""
    return {entry[field].key(): entry for entry in entries}


def look_up(table: dict[str, Entry], key: Entry) -> Entry:
    """Return the entry that a field refers to.

    Raises:
        DataError: `table` has no such entry.
    """
    name = key.key()
    if name not in table:
        raise key.error("the id of an entry of the file", name)
    return table[name]


Parts = tuple[Iterable[Entry], Callable[[Entry], Iterator[Record]]]
"""The entries of a file and a function from an entry to its records, so that an invalid entry can be skipped."""


@dataclass(frozen=True)
class Options:
    """Options of a conversion; see `Conversion`."""

    source: str
    image_template: str = ""
    splits: frozenset[str] = frozenset()
    kinds: tuple[str, ...] = ()
    seed: int = 0

    def takes(self, split: str) -> bool:
        return not self.splits or split in self.splits

    def image_name(self, **fields: str | int) -> str:
        """Return the name of an image's file.

        Raises:
            ValueError: the template does not match these fields.
        """
        try:
            return self.image_template.format(**fields)
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(
                f"image_name: expected a template for {', '.join(fields)}, got {self.image_template!r} ({error})"
            ) from error


@dataclass(frozen=True)
class Format:
    """A format that can be converted.

    Args:
        description: name of the dataset.
        files: usual names of the files, in the order of the arguments.
        parts: function that reads the files.
        image_template: template of the image's file name, for a format that gives only the number of an image.
        has_splits: whether a file holds several splits.
        has_regions: whether the format gives `rec` and `reg` samples.
        is_text: whether the file consists of lines of text instead of JSON.
    """

    description: str
    files: tuple[str, ...]
    parts: Callable[..., Parts]
    image_template: str = ""
    has_splits: bool = False
    has_regions: bool = False
    is_text: bool = False
