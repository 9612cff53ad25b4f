"""Images in tar files in WebDataset's layout: `000017.jpg`, and `000017.json` with its fields."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lion_fast.data.records import describe
from lion_fast.inference.bulk.items import Columns, Ids, Item, Source, printable, sized
from lion_fast.inference.bulk.tars import Span, read_members
from lion_fast.io.reading import brief, on_one_line, opened, parse_json


class ShardSource(Source):
    """Source of all members of tar files with the suffix of an image; ids are their own, or
    `shard.tar/000017.jpg`.

    Id, question, expression and tags are read from the `.json` member with the same key, if it holds an object. The
    headers are scanned once; members are then read by offset.

    Raises:
        ValueError: a file is not a complete, uncompressed tar file, or has names or keys that are ambiguous
            (`read_members`); or no image has a required field, or two have the same id.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]]):
        self._names: list[str] = []
        self._problems: dict[int, str] = {}
        positions, lengths = array("q"), []
        seen: set[str] = set()
        self._ids = Ids(columns)
        found: set[str | None] = set()  # of the fields that every image needs
        sizes = sized(files)  # before anything is read
        for file_index, (name, path) in enumerate(files):
            members = read_members(path)
            with opened(path, sizes[file_index][1]) as file:
                for member, image in members.images.items():
                    text = members.text_of(member)
                    fields: dict[str, Any] = {}
                    if text.size and (columns.text or columns.tags or columns.id):
                        file.seek(text.start)
                        try:
                            fields = _fields(file.read(text.size))
                        except ValueError:
                            fields = {}
                    found |= {columns.text, columns.id} & fields.keys()
                    self._ids.add(len(self._names), fields)
                    self._add(path, f"{name}/{member}", image, text, seen)
                    positions.extend((file_index, image.start, image.size, text.start, text.size))
                    lengths.append(columns.length(fields))
        if not self._names:
            raise ValueError(f"input: expected images in {files[0][1]}, found none")
        if columns.text is not None and columns.text not in found:
            raise ValueError(
                f"{columns.text}: expected one for all images, or a .json with a field of that name for each, "
                "got neither"
            )
        if columns.needs_id and columns.id not in found:
            raise ValueError(f"{columns.id}: expected a .json with a field of that name for each image, got none")
        super().__init__(columns, lengths, sizes)
        self._shards, self._positions = files, np.asarray(positions).reshape(-1, 5)
        self._ids.expect_unique(len(lengths), self._names.__getitem__)
        self.own_ids = bool(self._ids.own)

    def id(self, index: int) -> str | int:
        return self._ids.own.get(index, self._names[index])

    def __getitem__(self, index: int) -> Item:
        if index in self._problems:
            raise ValueError(self._problems[index])
        file_index, start, size, text_start, text_size = map(int, self._positions[index])
        path = self._shards[file_index][1]
        with opened(path, self.files[file_index][1]) as file:
            image = _content(file, path, start, size)
            fields: dict[str, Any] = {}
            # One that is read for an id alone, and has none, is no error: the image keeps its name.
            if self.columns.text is not None or self.columns.needs_id or (self.columns.tags is not None and text_size):
                fields = _fields(_content(file, path, text_start, text_size))
                self.columns.id_of(fields)  # an invalid one is an error of the row
        return Item(image, self._names[index], self.columns.text_of(fields), self.columns.tags_of(fields))

    def _add(self, path: Path, name: str, image: Span, text: Span, seen: set[str]) -> None:
        if (id := printable(name)) in seen:
            raise ValueError(f"{on_one_line(path)}: expected different names in UTF-8, got {id!r} twice")
        seen.add(id)
        problem = image.problem
        if problem is None and text.problem is not None:
            problem = f"the .json of the image: {text.problem}"
        if problem is not None:
            self._problems[len(self._names)] = problem
        self._names.append(id)


def _content(file: BinaryIO, path: Path, start: int, size: int) -> bytes:
    """Read a member.

    Raises:
        ValueError: its part of the disk cannot be read, which is no reason to lose the other members.
    """
    try:
        file.seek(start)
        return file.read(size)
    except OSError as error:
        raise ValueError(f"{on_one_line(path)}: expected {size} readable bytes at {start}: {brief(error)}") from error


def _fields(content: bytes) -> dict[str, Any]:
    """Parse the fields of an image's JSON member; a list (the records of an image) has none.

    Raises:
        ValueError: the content is not JSON, or neither an object nor a list.
    """
    if not content:
        return {}
    try:
        fields = parse_json(content, standard=False)
    except ValueError as error:
        raise ValueError(f"the .json of the image is {error}") from error
    if isinstance(fields, list):
        return {}
    if not isinstance(fields, dict):
        raise ValueError(f"the .json of the image: expected an object, got {describe(fields)}")
    return fields
