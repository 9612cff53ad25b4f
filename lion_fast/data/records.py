"""The format of training data: one JSON object per line, checked before training.

`docs/data.md` documents the fields; a `Record` holds one line.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lion_fast.io.atomic import whole_file
from lion_fast.io.boxes import format_box
from lion_fast.io.owning import made_directories
from lion_fast.io.reading import Repeated, Unreadable, naming_path, parse_json, shown
from lion_fast.tasks import TASKS

BOX_TEXT = re.compile(r"\[[01]\.\d{3}(?:,[01]\.\d{3}){3}\]")
"""The text of a box as `format_box` writes it."""

MAX_LINE_BYTES = 1 << 20
"""Maximum length of a line with its newline; a longer line is invalid."""

RESERVED = "<extra_id_0>"
"""Token of the learned soft prompt (`LionConfig.soft_prompt_token`), which no question or tag may contain."""

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
        ValueError: a field has the wrong type, text is blank, the task is unknown, a tag contains a comma, question or
            tag contains `RESERVED`, a box is empty, reversed or not inside 0..1, the text contains a box that is not in
            `boxes`, or the record does not fit into a line of `MAX_LINE_BYTES`.
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
            raise ValueError(f"task: expected {' or '.join(map(repr, TASKS))}, got {shown(self.task)}")
        for name in ("id", "source"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for i, tag in enumerate(self.tags or ()):
            _check_text(f"tags[{i}]", tag)
            if "," in tag:
                raise ValueError(f"tags[{i}]: expected one tag, got several in {shown(tag)}")
            _check_reserved(f"tags[{i}]", tag)
        _check_reserved("question", self.question)
        for i, box in enumerate(self.boxes):
            _check_box(f"boxes[{i}]", box)
        if self.task == "region_level" or self.boxes:
            known = {format_box(box) for box in self.boxes}
            for name in ("question", "answer"):
                for text in BOX_TEXT.findall(getattr(self, name)):
                    if text not in known:
                        some = f"{sorted(known)[:4]}{' ...' if len(known) > 4 else ''}"
                        raise ValueError(f"{name}: expected the text of one of the boxes {some}, got {text}")
        self._check_size()

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the newline."""
        values = {name: getattr(self, name) for name in (*_REQUIRED, *_OPTIONAL)}
        if not self.boxes:
            del values["boxes"]
        return json.dumps({name: value for name, value in values.items() if value is not None}, ensure_ascii=False)

    def _check_size(self) -> None:
        texts = (*(getattr(self, name) for name in (*_REQUIRED, "id", "source")), *(self.tags or ()))
        # A character takes at most 6 bytes, a box at most 4 numbers of 24, and the names of all fields fewer than 200.
        if 200 + sum(6 * len(text) + 4 for text in texts if text is not None) + 110 * len(self.boxes) < MAX_LINE_BYTES:
            return
        size = len(self.to_json().encode()) + 1
        if size > MAX_LINE_BYTES:
            raise ValueError(f"expected at most {MAX_LINE_BYTES} bytes in a line, got a record of {size}")


def parse_record(line: str | bytes, place: str) -> Record:
    """Parse the record of a line.

    Args:
        line: JSON text.
        place: location that starts the message of an error, such as `train.jsonl:17`.

    Raises:
        DataError: the line is not a JSON object with exactly the fields of `Record`.
    """
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
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
                raise ValueError(f"{shown(name)[1:-1]}: no such field; expected {', '.join((*_REQUIRED, *_OPTIONAL))}")
        tags, boxes = fields.get("tags"), fields.get("boxes")
        listed: dict[str, Any] = {
            "tags": None if tags is None else _tuple("tags", tags),
            "boxes": tuple(
                _tuple(f"boxes[{i}]", box) for i, box in enumerate(() if boxes is None else _tuple("boxes", boxes))
            ),
        }
        return Record(**(fields | listed))
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error


def write_jsonl(records: Iterable[Record], path: str | os.PathLike, *, overwrite: bool = True) -> int:
    """Write records to a file atomically and return their number.

    Args:
        records: read while the file is written; no other process can write it meanwhile.
        path: output file; missing directories are created.
        overwrite: whether a file with content is replaced.

    Raises:
        OutputExistsError: there is a file with content, without `overwrite`; it is not touched, and nothing is read.
        OutputInUseError: another process is writing the file.
        OSError: it cannot be written.
    """
    path = Path(path)
    count = 0
    with made_directories(path.parent), whole_file(path, overwrite=overwrite) as unfinished:
        with naming_path(unfinished):
            file = unfinished.open("w", encoding="utf-8")
        try:
            for record in records:
                line = record.to_json() + "\n"
                with naming_path(path):
                    file.write(line)
                count += 1
        finally:
            with naming_path(path):
                file.close()
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
    """Describe a value of a file in a few words, for messages."""
    if isinstance(value, str):
        return "text" if value.strip() else "blank text"
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
        return f"the number {text}" if len(text) <= 24 else f"the number {text[:20]}... of {len(text)} characters"
    names = {
        dict: "an object",
        list: "a list",
        bool: "a truth value",
        type(None): "null",
        bytes: "bytes",
        Repeated: "several values under one name",
        Unreadable: "a value that cannot be read",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected text, got {describe(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got half a surrogate pair")


def _check_reserved(name: str, text: str) -> None:
    if RESERVED in text:
        raise ValueError(f"{name}: expected text without {RESERVED!r}, the token of the soft prompt, got {shown(text)}")


def _check_box(name: str, box: Any) -> None:
    if len(box) != 4 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        raise ValueError(f"{name}: expected four numbers [x1, y1, x2, y2], got {shown(list(box)[:6])}")
    x1, y1, x2, y2 = box
    # Compared as they are: an integer may be too large for a float, and NaN fails every comparison.
    if not all(0 <= v <= 1 for v in box):
        raise ValueError(f"{name}: expected shares of width and height, 0..1, got {shown(list(box))}")
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"{name}: expected x1 < x2 and y1 < y2, got {shown(list(box))}")


def _tuple(name: str, value: Any) -> tuple:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {describe(value)}")
    return tuple(value)
