"""Pictures in tar files in WebDataset's layout: `000017.jpg`, and `000017.json` beside it for its fields."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lion_fast.data.records import describe
from lion_fast.inference.bulk.items import Columns, Item, Positions, Source, printable, sized
from lion_fast.io.images import image_suffixes


class ShardSource(Source):
    """Every member of a tar file whose name ends like a picture's; ids are `shard.tar/000017.jpg`.

    Question, expression and tags are read from the member of the same key that ends in `.json`, if it holds an object.
    Members are found once by their headers, and read by position afterwards.

    Raises:
        ValueError: for a file that is no plain tar file, or is cut off, or in which a name stands twice; or no picture
            has a field that is needed.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]]):
        self._names: list[str] = []
        positions, lengths = Positions(5), []
        has_text = False
        for place, (name, path) in enumerate(files):
            pictures, texts = _members(path)
            with path.open("rb") as file:
                for member, (start, size) in pictures.items():
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
                    positions.add(place, start, size, text_start, text_size)
                    lengths.append(columns.length(fields))
        if not self._names:
            raise ValueError(f"input: expected pictures in {files[0][1]}, found none")
        if columns.text is not None and not has_text:
            raise ValueError(
                f"{columns.text}: expected one for all pictures, or a .json beside each with a field of that name, "
                "got neither"
            )
        super().__init__(columns, lengths, sized(files))
        self._shards, self._positions = files, positions.array()

    def id(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Item:
        place, start, size, text_start, text_size = map(int, self._positions[index])
        with self._shards[place][1].open("rb") as file:
            file.seek(start)
            image = file.read(size)
            fields: dict[str, Any] = {}
            if self.columns.text is not None or (self.columns.tags is not None and text_size):
                file.seek(text_start)
                fields = _fields(file.read(text_size))
        return Item(image, self._names[index], self.columns.text_of(fields), self.columns.tags_of(fields))


def _members(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Start and size of pictures, by name, and of JSON, by key."""
    suffixes = image_suffixes()
    pictures: dict[str, tuple[int, int]] = {}
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
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if suffix in suffixes:
                    if member.name in pictures:
                        raise ValueError(f"{path}: expected every name once, got {member.name} twice")
                    pictures[member.name] = span
                elif suffix == ".json":
                    texts[_key(member.name)] = span
                tar.members = []  # what the loop has seen is not needed again
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole, uncompressed tar file ({error})") from error
    return pictures, texts


def _key(member: str) -> str:
    """A member's path up to the first dot of its name, as WebDataset has it."""
    path = PurePosixPath(member)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _fields(content: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no JSON. A list, of records of one picture, holds no fields of the picture."""
    if not content:
        return {}
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the .json beside it is not JSON ({' '.join(str(error).split())[:200]})") from error
    if isinstance(fields, list):
        return {}
    if not isinstance(fields, dict):
        raise ValueError(f"the .json beside it: expected an object, got {describe(fields)}")
    return fields
