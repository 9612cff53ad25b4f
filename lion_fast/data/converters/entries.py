"""What converters read and return.

Entries are JSON values with their path, for messages: `captions.json: annotations[3].caption: expected text, got null`.
"""

import math
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lion_fast.data.converters.skipping import Skipping
from lion_fast.data.records import DataError, Record, describe
from lion_fast.io.reading import Unreadable, check_regular, check_utf8, parse_json, read_content, shown, without_mark

# A format of an image's name: a width of at most two digits, and nothing that reads attributes.
_FORMAT_SPEC = re.compile(r"[<>=^]?0?\d{0,2}[ds]?")


class Entry:
    """A JSON value with its file and path; access to a value of the wrong type raises a `DataError` that names both.

    Args:
        value: value from `parse_json`, or `Unreadable` for a line that is not UTF-8.
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
        return " ".join(self.name_text().split())

    def name_text(self) -> str:
        """Return text as it is, such as the name of a file, in which every space counts."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error("text")
        return self.value

    def integer(self) -> int:
        """Return an integer, also if it is written as text."""
        number = self.value
        if isinstance(number, str) and number.isascii() and number.isdecimal() and len(number) <= 1000:
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool):
            raise self.error("a whole number")
        return number

    def number(self) -> float:
        """Return a number that is finite as a float."""
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            raise self.error("a number")
        try:
            finite = math.isfinite(self.value)
        except OverflowError:
            finite = False
        if not finite:
            raise self.error("a finite number")
        return self.value

    def key(self) -> str:
        """Return the identifier of an entry, a number or text, as text."""
        return self.name_text() if isinstance(self.value, str) else str(self.integer())

    def error(self, expected: str, got: str | None = None) -> DataError:
        got = describe(self.value) if got is None else got
        return DataError(f"{self.place}: expected {expected}, got {got if len(got) <= 200 else got[:197] + '...'}")

    def _field(self, name: str) -> "Entry":
        label = name if name.isprintable() and len(name) <= 100 else shown(name)
        path = f"{self.path}.{label}" if self.path else label
        return Entry(self.value.get(name), self.file, path, name)


def load_json(path: Path) -> Entry:
    """Load a JSON file.

    Raises:
        DataError: the file is not JSON in UTF-8.
        OSError: there is no such file, or it cannot be read.
    """
    check_regular(path, "a file of JSON")
    try:
        # A number of any size is an error of its entry alone.
        return Entry(parse_json(read_content(path), standard=False), path)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def load_lines(path: Path) -> list[Entry]:
    """Load the non-blank lines of a text file; the value of a line that is not UTF-8 is `Unreadable`.

    Raises:
        DataError: the file is UTF-16 or UTF-32.
        OSError: there is no such file, or it cannot be read.
    """
    check_regular(path, "a file of lines")
    content = read_content(path)
    try:
        check_utf8(content)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    lines = enumerate(map(_decoded, without_mark(content).splitlines()), 1)
    return [Entry(line, path, f"line {number}") for number, line in lines if not isinstance(line, str) or line.strip()]


def _decoded(line: bytes) -> str | Unreadable:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return Unreadable()


class Table(dict[str, Entry]):
    """Entries of a file by the key that identifies them; `ambiguous` keys have two entries, and are not in it."""

    def __init__(self) -> None:
        self.ambiguous: dict[str, str] = {}

    def of(self, key: Entry) -> Entry:
        """Return the entry that a field refers to.

        Raises:
            DataError: there is no such entry, or more than one.
        """
        name = key.key()
        if name in self.ambiguous:
            raise key.error("the id of one entry", f"{shown(name)}, the id of {self.ambiguous[name]}")
        if name not in self:
            raise key.error("the id of an entry of the file", shown(name)[1:-1])
        return self[name]


def index_by(entries: Iterable[Entry], name: str, skipping: Skipping) -> Table:
    """Index entries by the field that identifies them.

    An id that two entries have belongs to neither: which of them is meant cannot be known.

    Raises:
        DataError: an entry has no id, or the id of another entry, unless such entries are skipped.
    """
    table = Table()
    for entry in entries:
        with skipping.entry(entry.place):
            key = entry[name].key()
            if key in table.ambiguous:
                raise repeated(entry[name], table.ambiguous[key])
            if key in table:
                first = table.pop(key)
                table.ambiguous[key] = f"{first.path} and {entry.path}"
                raise repeated(entry[name], first.path)
            table[key] = entry
    return table


def repeated(key: Entry, others: str) -> DataError:
    """Return the error of an id that other entries of its file have."""
    return key.error("an id of its own", f"{shown(key.value)}, the id of {others}")


def check_same(ours: Entry, theirs: Entry) -> None:
    """Check that two entries refer to the same image, for example a region and its annotation.

    Raises:
        DataError: they differ.
    """
    if ours.key() != theirs.key():
        raise ours.error(f"{shown(theirs.value)}, as {theirs.place} says", shown(ours.value))


@dataclass(frozen=True)
class Unit:
    """What becomes one sample, or one of each kind: a part of an entry, with what else of the entry is needed.

    An invalid unit is skipped alone.
    """

    entry: Entry
    context: Any = None


def whole_entry(entry: Entry) -> Iterator[Unit]:
    """Return an entry as its only unit."""
    yield Unit(entry)


@dataclass(frozen=True)
class Parts:
    """How a file is converted.

    Args:
        entries: the file's entries.
        records: returns the records of a unit, or raises an error if it is invalid.
        units: returns the units of an entry, or raises an error if what they share is invalid.
    """

    entries: Iterable[Entry]
    records: Callable[[Unit], Iterator[Record]]
    units: Callable[[Entry], Iterator[Unit]] = whole_entry


@dataclass(frozen=True)
class Options:
    """Options of a conversion; see `Conversion`."""

    source: str
    image_template: str = ""
    splits: frozenset[str] = frozenset()
    kinds: tuple[str, ...] = ()
    seed: int = 0
    skipping: Skipping = field(default_factory=lambda: Skipping(strict=True))
    found_splits: set[str] = field(default_factory=set)

    def takes(self, split: str) -> bool:
        """Return whether a split is chosen; the splits that occur are kept in `found_splits`."""
        self.found_splits.add(split)
        return not self.splits or split in self.splits

    def image_name(self, **fields: str | int) -> str:
        """Return the name of an image's file.

        Raises:
            ValueError: the template does not match these fields.
        """
        try:
            for _, name, spec, conversion in string.Formatter().parse(self.image_template):
                if name is not None and (name not in fields or conversion or not _FORMAT_SPEC.fullmatch(spec or "")):
                    raise ValueError("a field is one of these names, and a width such as :012d")
            return self.image_template.format(**fields)
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(
                f"image_name: expected a template for {', '.join(fields)}, got {shown(self.image_template)} ({error})"
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
