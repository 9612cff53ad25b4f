"""Files of JSON lines and Parquet files with an image, or its path, in every row."""

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lion_fast.data.dataset import is_blank, lines_with_offsets
from lion_fast.data.records import MAX_LINE_BYTES, describe
from lion_fast.extras import require
from lion_fast.inference.bulk.cells import check_columns, rows_of
from lion_fast.inference.bulk.items import Columns, Ids, Item, Source, printable, sized
from lion_fast.io.reading import check_utf8, naming, opened, parse_json, shown

_CACHED_BYTES = 256 << 20
_NAMES = 20  # fields of the lines that are listed in a message


class JsonlSource(Source):
    """Source of JSON lines, each an object with the path of an image; ids are their own, or `file.jsonl:17`.

    Blank lines are ignored.

    Raises:
        ValueError: no line has a required field, or two have the same id.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]], image_root: Path | None):
        positions, lengths = array("q"), []
        seen: set[str] = set()
        self._ids = Ids(columns)
        needed = {
            name for name in (columns.image, columns.text, columns.id if columns.needs_id else None) if name is not None
        }
        sizes = sized(files)  # before anything is read
        for file_index, (_, path) in enumerate(files):
            with opened(path, sizes[file_index][1]) as file, naming(path, "a file of JSON lines"):
                check_utf8(file.read(4))
                file.seek(0)
                for number, (offset, line) in enumerate(lines_with_offsets(file), 1):
                    if line is not None and is_blank(line):
                        continue
                    positions.extend((file_index, offset, number))
                    try:
                        fields = _parse(line)
                    except ValueError:
                        fields = {}
                    seen.update(fields.keys() if len(seen) < _NAMES else fields.keys() & needed)
                    self._ids.add(len(lengths), fields)
                    lengths.append(columns.length(fields))
        for name in sorted(needed - seen):
            some = ", ".join(shown(name)[1:-1] for name in sorted(seen)[:_NAMES])[:500] or "no fields"
            raise ValueError(
                f"columns: expected lines with {shown(name)}, got none in {files[0][0]}; the lines have {some}"
            )
        super().__init__(columns, lengths, sizes)
        self._tables, self._image_root, self._positions = files, image_root, np.asarray(positions).reshape(-1, 3)
        self._ids.expect_unique(len(lengths), self._place)
        self.own_ids = bool(self._ids.own)

    def id(self, index: int) -> str | int:
        id = self._ids.own.get(index)
        return self._place(index) if id is None else id

    def _place(self, index: int) -> str:
        file_index, _, number = self._positions[index]
        return f"{printable(self._tables[file_index][0])}:{number}"

    def __getitem__(self, index: int) -> Item:
        file_index, offset, _ = self._positions[index]
        path = self._tables[file_index][1]
        with opened(path, self.files[file_index][1]) as file:
            file.seek(offset)
            line = file.readline(MAX_LINE_BYTES)
        fields = _parse(None if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n") else line)
        return item_of(fields, self.columns, self._image_root or path.parent)


class ParquetSource(Source):
    """Source of the rows of Parquet files; ids are their own, or `file.parquet:17`, counted from 0.

    The image column holds paths, the content of image files, or structs of `bytes` and `path` as in Hugging Face's
    datasets. Row groups are read completely; each process caches the most recent ones, up to 256 MiB.

    Raises:
        ValueError: a file cannot be read or lacks a column, or two rows have the same id.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]], image_root: Path | None):
        require("parquet", "pyarrow")
        import pyarrow.parquet as pq

        groups, lengths, start = [], [np.zeros(0, np.int32)], 0
        self._ids = Ids(columns)
        sizes = sized(files)  # before anything is read
        for file_index, (_, path) in enumerate(files):
            file_start = start
            with (
                opened(path, sizes[file_index][1]),
                naming(path, "a readable Parquet file"),
                pq.ParquetFile(path) as file,
            ):
                names = file.schema_arrow.names
                check_columns(
                    path,
                    names,
                    [columns.image, columns.text, columns.id if columns.needs_id else None],
                    [columns.tags, columns.id],
                )
                wanted = (columns.text, columns.tags, columns.id)
                texts = [str(name) for name in names if name in wanted]
                for group in range(file.num_row_groups):
                    lengths.append(_lengths(file, group, texts, columns, self._ids, start))
                    groups.append((file_index, group, start, file_start))
                    start += len(lengths[-1])
        super().__init__(columns, np.concatenate(lengths), sizes)
        self._tables, self._image_root, self._groups = files, image_root, np.array(groups, np.int64).reshape(-1, 4)
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._ids.expect_unique(start, self._place)
        self.own_ids = bool(self._ids.own)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def id(self, index: int) -> str | int:
        id = self._ids.own.get(index)
        return self._place(index) if id is None else id

    def _place(self, index: int) -> str:
        file_index, _, _, file_start = self._groups[self._group_of(index)]
        return f"{printable(self._tables[file_index][0])}:{index - file_start}"

    def __getitem__(self, index: int) -> Item:
        group = self._group_of(index)
        file_index, _, start, _ = self._groups[group]
        (fields,) = rows_of(self._read(group).slice(index - start, 1))
        return item_of(fields, self.columns, self._image_root or self._tables[file_index][1].parent)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._groups[:, 2], index, side="right")) - 1

    def _read(self, group: int) -> Any:
        if group not in self._cache:
            import pyarrow.parquet as pq

            file_index, number, _, _ = self._groups[group]
            path, size = self._tables[file_index][1], self.files[file_index][1]
            with opened(path, size), naming(path, "a readable Parquet file"), pq.ParquetFile(path) as file:
                wanted = {self.columns.image, self.columns.text, self.columns.tags, self.columns.id}
                names = wanted & set(file.schema_arrow.names)
                self._cache[group] = file.read_row_group(int(number), columns=sorted(names))
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > _CACHED_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def item_of(fields: Mapping[str, Any], columns: Columns, root: Path) -> Item:
    """Return the input of a table's row.

    Args:
        root: directory that relative paths start from.

    Raises:
        ValueError: the row has no image, or its id, text or tags have the wrong type.
    """
    image = fields.get(columns.image)
    path = image
    if isinstance(image, dict):
        content, path = image.get("bytes"), image.get("path")
        if not isinstance(content, bytes | None):
            raise ValueError(f"{columns.image}.bytes: expected the content of an image file, got {describe(content)}")
        image = path if content is None else content
    if not isinstance(image, str | bytes) or not image:
        raise ValueError(f"{columns.image}: expected an image, got {'nothing' if not image else describe(image)}")
    columns.id_of(fields)  # an invalid one is an error of the row
    if isinstance(image, str) and image[:8].lower().startswith(("http://", "https://")):
        raise ValueError(f"{columns.image}: expected a path or the content of a file, got the URL {shown(image)[1:-1]}")
    name = printable(path) if isinstance(path, str) else None
    content = image if isinstance(image, bytes) else root / image
    return Item(content, name, columns.text_of(fields), columns.tags_of(fields))


def _lengths(file: Any, group: int, texts: list[str], columns: Columns, ids: Ids, start: int) -> np.ndarray:
    """Return the lengths of a row group's texts, and read its ids; `start` is the index of its first row."""
    if not texts:
        metadata = file.metadata.row_group(group)
        count = min(metadata.column(number).num_values for number in range(metadata.num_columns))
        if count < metadata.num_rows:
            raise ValueError(f"row group {group} says {metadata.num_rows} rows, but a column has {count} values")
        return np.zeros(metadata.num_rows, np.int32)
    rows = rows_of(file.read_row_group(group, columns=texts))
    for number, fields in enumerate(rows):
        ids.add(start + number, fields)
    return np.array([columns.length(fields) for fields in rows], np.int32)


def _parse(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise ValueError(f"expected at most {MAX_LINE_BYTES} bytes in a line")
    fields = parse_json(line, standard=False)
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {describe(fields)}")
    return fields
