"""JSON values with their path, for messages: `captions.json: annotations[3].caption: expected text, got null`."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lion_fast.data.records import DataError, describe


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
