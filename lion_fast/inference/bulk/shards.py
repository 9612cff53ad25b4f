"""Images in tar files in WebDataset's layout: `000017.jpg`, and `000017.json` with its fields."""

import json
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lion_fast.data.records import describe
from lion_fast.inference.bulk.items import Columns, Item, Source, printable, sized
from lion_fast.io.images import image_suffixes


class ShardSource(Source):
    """Source of all members of tar files with the suffix of an image; ids are `shard.tar/000017.jpg`.

    Question, expression and tags are read from the `.json` member with the same key, if it holds an object. The headers
    are scanned once; members are then read by offset.

    Raises:
        ValueError: a file is not an uncompressed tar file, is truncated or contains a name twice; or no image has a
            required field.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]]):
        self._names: list[str] = []
        positions, lengths = array("q"), []
        has_text = False
        for file_index, (name, path) in enumerate(files):
            images, texts = _members(path)
            with path.open("rb") as file:
                for member, (start, size) in images.items():
                    text_start, text_size = texts.get(_key(member), (0, 0))
                    fields: dict[str, Any] = {}
                    if text_size and (columns.text or columns.tags):
                        file.seek(text_start)
                        try:
                            fields = _fields(file.read(text_size))
                        except ValueError:
                            fields = {}
                    has_text |= columns.text in fields
                    self._names.append(printable(f"{name}/{member}"))
                    positions.extend((file_index, start, size, text_start, text_size))
                    lengths.append(columns.length(fields))
        if not self._names:
            raise ValueError(f"input: expected images in {files[0][1]}, found none")
        if columns.text is not None and not has_text:
            raise ValueError(
                f"{columns.text}: expected one for all images, or a .json with a field of that name for each, "
                "got neither"
            )
        super().__init__(columns, lengths, sized(files))
        self._shards, self._positions = files, np.asarray(positions).reshape(-1, 5)

    def id(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Item:
        file_index, start, size, text_start, text_size = map(int, self._positions[index])
        with self._shards[file_index][1].open("rb") as file:
            file.seek(start)
            image = file.read(size)
            fields: dict[str, Any] = {}
            if self.columns.text is not None or (self.columns.tags is not None and text_size):
                file.seek(text_start)
                fields = _fields(file.read(text_size))
        return Item(image, self._names[index], self.columns.text_of(fields), self.columns.tags_of(fields))


def _members(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Return start and size of the images by name, and of the JSON members by key."""
    suffixes = image_suffixes()
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int]] = {}
    try:
        tar: Any
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                span = member.offset_data, member.size
                suffix = PurePosixPath(member.name).suffix.lower()
                if not member.isreg():
                    continue
                if span[0] + span[1] > path.stat().st_size:
                    raise tarfile.ReadError(f"{member.name} is truncated")
                if suffix in suffixes:
                    if member.name in images:
                        raise ValueError(f"{path}: expected every name once, got {member.name} twice")
                    images[member.name] = span
                elif suffix == ".json":
                    texts[_key(member.name)] = span
                tar.members = []  # frees the headers that the loop has seen
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a complete, uncompressed tar file ({error})") from error
    return images, texts


def _key(member: str) -> str:
    """Return a member's path up to the first dot of its name, WebDataset's key."""
    path = PurePosixPath(member)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _fields(content: bytes) -> dict[str, Any]:
    """Parse the fields of an image's JSON member; a list (the records of an image) has none.

    Raises:
        ValueError: the content is not JSON, or neither an object nor a list.
    """
    if not content:
        return {}
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the .json of the image is not JSON ({' '.join(str(error).split())[:200]})") from error
    if isinstance(fields, list):
        return {}
    if not isinstance(fields, dict):
        raise ValueError(f"the .json of the image: expected an object, got {describe(fields)}")
    return fields
