"""Sections of settings, read strictly: frozen dataclasses that reject values of the wrong type with a precise error."""

import dataclasses
import json
import math
import os
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from lion_fast.io.reading import shown


class RecipeError(ValueError):
    """An invalid recipe; the message names each key, the expected value and the actual one."""


@dataclass(frozen=True)
class Limits:
    """Limits of a number, for the annotation of a field: `Annotated[int, Limits(at_least=1)]`."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def broken_by(self, value: float) -> str | None:
        """Return the limit that `value` breaks, in words, or None. NaN breaks every limit."""
        if self.above is not None and not value > self.above:
            return f"greater than {self.above}"
        if self.at_least is not None and not value >= self.at_least:
            return f"greater than or equal to {self.at_least}"
        if self.below is not None and not value < self.below:
            return f"less than {self.below}"
        if self.at_most is not None and not value <= self.at_most:
            return f"less than or equal to {self.at_most}"
        return None


@dataclass(frozen=True)
class PathName:
    """Marks strings as paths, for the annotation of a field: `~` and environment variables are expanded.

    Args:
        unless: prefix of strings that are no paths.
    """

    unless: str | None = None

    def problem(self, text: str) -> str | None:
        """Return what a text should be to be used as a path, or None."""
        if self._is_other(text):
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            return "a path in UTF-8"
        if not text or "\0" in text:
            return "a path"
        expanded = self.expanded(text)
        if len(expanded) > _MAX_PATH or any(len(part.encode()) > _MAX_NAME for part in expanded.split("/")):
            return f"a path of at most {_MAX_PATH} characters and names of at most {_MAX_NAME} bytes"
        # What cannot be expanded may be the name of an existing file, but must not become that of a new one.
        if not os.path.lexists(expanded):
            if expanded.startswith("~"):
                return "the name of a user after ~"
            if unset := [name for name in _VARIABLE.findall(expanded) if name.strip("{}") not in os.environ]:
                return f"environment variables that are set (${unset[0]} is not)"
        return None

    def expanded(self, text: str) -> str:
        return text if self._is_other(text) else os.path.expandvars(os.path.expanduser(text))

    def _is_other(self, text: str) -> bool:
        return self.unless is not None and text.startswith(self.unless)


_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)  # what `os.path.expandvars` replaces
_MAX_PATH, _MAX_NAME = 4000, 255  # Linux refuses longer ones


@dataclass(frozen=True)
class Section:
    """Base of a dataclass of settings.

    Supported field types are `bool`, `int`, `float`, `str`, `Literal` strings, tuples of a fixed length or lists of
    these, None, and sections. `Annotated` gives numbers `Limits`, and makes strings paths (`PathName`). A `float` field
    accepts an integer. Numbers are finite.

    Raises:
        RecipeError: on creation, for a value of the wrong type or contradictory settings.
    """

    def __post_init__(self) -> None:
        problems = []
        for name, kind in _fields(type(self)).items():
            found = _problems(getattr(self, name), kind, name)
            problems += found
            if not found:
                object.__setattr__(self, name, _expanded(getattr(self, name), kind))
        _expect_none(problems or list(self.contradictions())[:1])

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between valid settings, as `key: expected ..., got ...`; only the first is reported."""
        return iter(())

    def plain(self) -> dict[str, Any]:
        """Return the settings as dicts, lists and values, as `read` takes them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # with lists for tuples, which YAML lacks

    @classmethod
    def read(cls, settings: dict[str, Any]) -> Self:
        """Create a section from plain data with exactly its keys.

        Raises:
            RecipeError: lists every key that is missing, unknown or of the wrong type.
        """
        problems: list[str] = []
        section = _read(cls, settings, "", problems)
        _expect_none(problems)
        assert isinstance(section, cls)
        return section


def shown_name(name: Any) -> str:
    """Return a key or a path for an error's message: itself, or shortened and quoted if it is long or has no words."""
    text = str(name) if isinstance(name, str | os.PathLike) else shown(name)
    if text.isprintable() and 0 < len(text) <= _MAX_NAME_SHOWN:
        return text
    return repr(text if len(text) <= _MAX_NAME_SHOWN else f"{text[:_MAX_NAME_SHOWN]}...")


_MAX_NAME_SHOWN = 240
_MAX_MESSAGE = 800


def _expect_none(problems: list[str]) -> None:
    """Raise a RecipeError with as many of the problems as fit in a message."""
    if problems:
        count = 1
        while count < len(problems) and len("; ".join(problems[: count + 1])) <= _MAX_MESSAGE:
            count += 1
        more = [] if count == len(problems) else [f"and {len(problems) - count} more"]
        raise RecipeError("; ".join([*problems[:count], *more]))


def _fields(section: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _read(section: type[Section], settings: Any, prefix: str, problems: list[str]) -> Section | None:
    """Return the section, or None after adding to `problems`."""
    if not isinstance(settings, dict):
        problems.append(f"{prefix.rstrip('.') or 'recipe'}: expected keys with values, got {shown(settings)}")
        return None
    kinds, values, before = _fields(section), {}, len(problems)
    for name, kind in kinds.items():
        if name not in settings:
            problems.append(f"{prefix}{name}: missing")
        elif _is_section(kind):
            values[name] = _read(kind, settings[name], f"{prefix}{name}.", problems)
        elif found := _problems(settings[name], kind, f"{prefix}{name}"):
            problems += found
        else:
            values[name] = _of_kind(settings[name], kind)
    problems += [
        f"{prefix}{shown_name(name)}: unknown key; expected one of {', '.join(kinds)}"
        for name in settings
        if name not in kinds
    ]
    if len(problems) > before:
        return None
    try:
        return section(**values)
    except RecipeError as error:
        problems.append(f"{prefix}{error}")
        return None


def _of_kind(value: Any, kind: Any) -> Any:
    """Convert a value of YAML to the type of its field: YAML has no tuples, and writes the float 1.0 also as 1."""
    kinds = _alternatives(kind)
    if isinstance(value, list):
        items = [get_args(each) for each in kinds if get_origin(each) is tuple]
        return tuple(map(_of_kind, value, items[0])) if items and len(items[0]) == len(value) else value
    return float(value) if float in kinds and type(value) is int else value


def _expanded(value: Any, kind: Any) -> Any:
    """Return a valid value with its paths expanded."""
    items = [get_args(each)[0] for each in _alternatives(kind) if get_origin(each) is list]
    if isinstance(value, list) and items:
        return [_expanded(item, items[0]) for item in value]
    marks = [mark for mark in _marks(kind) if isinstance(mark, PathName)]
    return marks[0].expanded(value) if marks and isinstance(value, str) else value


def _problems(value: Any, kind: Any, name: str) -> list[str]:
    """Return the errors of a value that should be of type `kind`."""
    if _is_section(kind):
        return [] if isinstance(value, kind) else [f"{name}: expected {kind.__name__}, got {shown(value)}"]
    for each in _alternatives(kind):
        if get_origin(each) in (list, tuple) and isinstance(value, list | tuple):
            items = get_args(each) if get_origin(each) is tuple else get_args(each) * len(value)
            if len(items) == len(value):
                pairs = enumerate(zip(value, items, strict=True))
                return [problem for i, (item, own) in pairs for problem in _problems(item, own, f"{name}.{i}")]
    expected = [_expected(value, each) for each in _alternatives(kind)]
    if None in expected:
        expected = [_unfit(value, mark) for mark in _marks(kind)]
        if float in _alternatives(kind) and not _is_finite(value):
            expected.append("a finite number")
        return [f"{name}: expected {text}, got {shown(value)}" for text in expected if text][:1]
    return [f"{name}: expected {' or '.join(text for text in expected if text)}, got {shown(value)}"]


def _marks(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _unfit(value: Any, mark: Any) -> str | None:
    """Return what a value of the right type should be instead, or None."""
    if isinstance(mark, Limits) and isinstance(value, int | float):
        return mark.broken_by(value)
    return mark.problem(value) if isinstance(mark, PathName) and isinstance(value, str) else None


def _is_finite(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) <= sys.float_info.max  # a larger integer cannot become a float
    return not isinstance(value, float) or math.isfinite(value)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _expected(value: Any, kind: Any) -> str | None:
    """Return a description of `kind`, or None if `value` is of that type."""
    if get_origin(kind) is Literal:
        names = [repr(choice) for choice in get_args(kind)]
        return None if value in get_args(kind) else " or ".join([", ".join(names[:-1]), names[-1]])
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))}"  # `_problems` checks a list of this length item by item
    texts = {bool: "true or false", int: "a valid integer", float: "a valid number", str: "a valid string"}
    if kind is type(None):
        return None if value is None else "null"
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind if kind in texts else ())
    if fits and (kind is bool or not isinstance(value, bool)):
        return None
    return texts.get(kind, "a valid list")
