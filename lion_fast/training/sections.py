"""Sections of settings, read strictly: frozen dataclasses that reject values of the wrong type with a precise error."""

import dataclasses
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints


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
class Section:
    """Base of a dataclass of settings.

    Supported field types are `bool`, `int`, `float`, `str`, `Literal` strings, tuples of a fixed length or lists of
    these, None, and sections. `Annotated` gives numbers `Limits`. A `float` field accepts an integer.

    Raises:
        RecipeError: on creation, for a value of the wrong type or contradictory settings.
    """

    def __post_init__(self) -> None:
        problems = []
        for name, kind in _fields(type(self)).items():
            problems += _problems(getattr(self, name), kind, name)
        problems = problems or list(self.contradictions())[:1]
        if problems:
            raise RecipeError("; ".join(problems))

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
        if problems:
            raise RecipeError("; ".join(problems))
        assert isinstance(section, cls)
        return section


def _fields(section: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _read(section: type[Section], settings: Any, prefix: str, problems: list[str]) -> Section | None:
    """Return the section, or None after adding to `problems`."""
    if not isinstance(settings, dict):
        problems.append(f"{prefix.rstrip('.') or 'recipe'}: expected keys with values, got {settings!r}")
        return None
    kinds, values, before = _fields(section), {}, len(problems)
    for name, kind in kinds.items():
        if name not in settings:
            problems.append(f"{prefix}{name}: missing")
        elif _is_section(kind):
            values[name] = _read(kind, settings[name], f"{prefix}{name}.", problems)
        else:
            problems += _problems(settings[name], kind, f"{prefix}{name}")
            values[name] = _of_kind(settings[name], kind)
    problems += [
        f"{prefix}{name}: unknown key; expected one of {', '.join(kinds)}" for name in settings if name not in kinds
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


def _problems(value: Any, kind: Any, name: str) -> list[str]:
    """Return the errors of a value that should be of type `kind`."""
    if _is_section(kind):
        return [] if isinstance(value, kind) else [f"{name}: expected {kind.__name__}, got {value!r}"]
    for each in _alternatives(kind):
        if get_origin(each) in (list, tuple) and isinstance(value, list | tuple):
            items = get_args(each) if get_origin(each) is tuple else get_args(each) * len(value)
            if len(items) == len(value):
                pairs = enumerate(zip(value, items, strict=True))
                return [problem for i, (item, own) in pairs for problem in _problems(item, own, f"{name}.{i}")]
    expected = [_expected(value, each) for each in _alternatives(kind)]
    if None in expected:
        limits = [each for each in get_args(kind)[1:] if isinstance(each, Limits)]
        numbers = [value] if isinstance(value, int | float) else []
        broken = [text for limit in limits for number in numbers if (text := limit.broken_by(number))]
        return [f"{name}: expected {text}, got {value!r}" for text in broken]
    return [f"{name}: expected {' or '.join(text for text in expected if text)}, got {value!r}"]


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
