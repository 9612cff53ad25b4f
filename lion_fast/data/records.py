"""The format of training data: one JSON object per line, checked before training.

`docs/data.md` documents the fields; a `Record` holds one line.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lion_fast.io.atomic import whole_file
from lion_fast.io.boxes import format_box
from lion_fast.tasks import TASKS

BOX_TEXT = re.compile(r"\[[01]\.\d{3}(?:,[01]\.\d{3}){3}\]")
"""The text of a box as `format_box` writes it."""

Box = tuple[float, float, float, float]

_REQUIRED = ("image", "task", "question", "answer")
_OPTIONAL = ("tags", "boxes", "id", "source")


class DataError(ValueError):
    """Invalid training data; the message starts with file and line, or file and record."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample: an image, an instruction and its answer.

    Args:
        image: path of the image, absolute or relative to a root that the reader knows.
        task: `image_level` or `region_level`.
        question: instruction or question for the model.
        answer: target text.
        tags: tags of the image, for the tag sentence; None if the image has not been tagged.
        boxes: [x1, y1, x2, y2] each, 0..1 of the upright image's width and height.
        id: name of the sample in its source.
        source: name of the original dataset.

    Raises:
        ValueError: a field has the wrong type, text is blank, the task is unknown, a tag contains a comma, a box is
            empty, reversed or not inside 0..1, or the text contains a box that is not in `boxes`.
    """

    image: str
    task: str
    question: str
    answer: str
    tags: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] = ()
    id: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for name in _REQUIRED:
            _check_text(name, getattr(self, name))
        if self.task not in TASKS:
            raise ValueError(f"task: expected {' or '.join(map(repr, TASKS))}, got {self.task!r}")
        for name in ("id", "source"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for i, tag in enumerate(self.tags or ()):
            _check_text(f"tags[{i}]", tag)
            if "," in tag:
                raise ValueError(f"tags[{i}]: expected one tag, got several in {tag!r}")
        for i, box in enumerate(self.boxes):
            _check_box(f"boxes[{i}]", box)
        if self.task == "region_level" or self.boxes:
            known = {format_box(box) for box in self.boxes}
            for name in ("question", "answer"):
                for text in BOX_TEXT.findall(getattr(self, name)):
                    if text not in known:
                        raise ValueError(f"{name}: expected the text of one of the boxes {sorted(known)}, got {text}")

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the newline."""
        values = {name: getattr(self, name) for name in (*_REQUIRED, *_OPTIONAL)}
        if not self.boxes:
            del values["boxes"]
        return json.dumps({name: value for name, value in values.items() if value is not None}, ensure_ascii=False)


def parse_record(line: str | bytes, place: str) -> Record:
    """Parse the record of a line.

    Args:
        line: JSON text.
        place: location that starts the message of an error, such as `train.jsonl:17`.

    Raises:
        DataError: the line is not a JSON object with exactly the fields of `Record`.
    """
    try:
        # ValueError includes invalid UTF-8; thousands of nested brackets raise RecursionError.
        fields = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({' '.join(str(error).split())[:200]})") from error
    return record_from_fields(fields, place)


def record_from_fields(fields: Any, place: str) -> Record:
    """Create a record from fields parsed by `json.loads`; see `parse_record`."""
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, got {describe(fields)}")
        for name in _REQUIRED:
            if name not in fields:
                raise ValueError(f"{name}: missing")
        for name in fields:
            if name not in _REQUIRED and name not in _OPTIONAL:
                raise ValueError(f"{name[:50]}: no such field; expected {', '.join((*_REQUIRED, *_OPTIONAL))}")
        listed = {"tags": _tuple("tags", fields.get("tags")), "boxes": _tuple("boxes", fields.get("boxes")) or ()}
        listed["boxes"] = tuple(_tuple(f"boxes[{i}]", box) for i, box in enumerate(listed["boxes"]))
        return Record(**(fields | listed))
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error


def write_jsonl(records: Iterable[Record], path: str | os.PathLike) -> int:
    """Write records to a file atomically and return their number."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.to_json() + "\n")
            count += 1
    return count


def rewrite_boxes(text: str, before: Sequence[Box], after: Sequence[Box]) -> str:
    """Replace the text of each box of `before` in `text` with the text of the corresponding box of `after`.

    If several boxes have the same text, rounded to three decimals, the first one determines the replacement.
    """
    moved: dict[str, str] = {}
    for old, new in zip(before, after, strict=True):
        moved.setdefault(format_box(old), format_box(new))
    return BOX_TEXT.sub(lambda match: moved.get(match[0], match[0]), text)


def describe(value: Any) -> str:
    """Describe a JSON value in a few words, for messages."""
    if isinstance(value, str):
        return "text" if value.strip() else "blank text"
    names = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"the number {str(value)[:20]}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected text, got {describe(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got half a surrogate pair")


def _check_box(name: str, box: Any) -> None:
    if len(box) != 4 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        raise ValueError(f"{name}: expected four numbers [x1, y1, x2, y2], got {list(box)[:6]}")
    x1, y1, x2, y2 = box
    if not all(math.isfinite(v) and 0 <= v <= 1 for v in box):
        raise ValueError(f"{name}: expected shares of width and height, 0..1, got {list(box)}")
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"{name}: expected x1 < x2 and y1 < y2, got {list(box)}")


def _tuple(name: str, value: Any) -> tuple | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {describe(value)}")
    return tuple(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
