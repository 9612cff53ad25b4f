"""Outputs of a bulk job, which survive a kill at any byte and show which inputs remain.

Rows are appended to a file of JSON lines and synced to disk batch by batch. After a kill, the last line may be
truncated; it is removed, and its input is processed again. Each of several processes appends to its own file
(`captions.jsonl.rank-00001`), whose rows are moved into the output when the job starts and when it ends. Parquet files
cannot be appended to, so rows for Parquet also go to such a file first, and from there to `part-00000.parquet` and so
on, each written atomically.

Every step can be killed and repeated: a row is moved only if the output has no row with its id. Files with other names
in a Parquet output's directory, or beside a file, are never touched.
"""

import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lion_fast.extras import require
from lion_fast.inference.bulk.rows import Journal, Row, expect_rows, read_rows
from lion_fast.io.atomic import UNFINISHED, whole_file
from lion_fast.io.reading import naming, naming_path, opened

ROWS_PER_PART = 10_000
PART = "part-{:05d}.parquet"
JOURNAL_SUFFIX = "_rank-{:05d}.jsonl"
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
_JOURNAL_NAME = re.compile(r"_rank-\d{5,}\.jsonl")
# Left by a kill while a part was written; the first form is that of earlier versions.
_LEFT = re.compile(
    rf"part-\d{{5,}}\.parquet{re.escape(UNFINISHED)}"
    rf"|\.part-\d{{5,}}\.parquet(-[0-9a-f]{{8}}{re.escape(UNFINISHED)}|\.lock)"
)


class Output(ABC):
    """The common output of a job's processes.

    Args:
        path: path of the output.
    """

    def __init__(self, path: Path):
        self.path = path

    def settle(self) -> None:
        """Repair the files after a kill, and move the rows of all processes into the output; called on one process."""
        for path in self._journals():
            Journal(path).close()
        seen: set[str] | None = None
        for path in self._journals():
            seen = set(self.ids()) if seen is None else seen
            rows = (row for row in read_rows(path) if str(row["id"]) not in seen)
            while chunk := list(itertools.islice(rows, ROWS_PER_PART)):
                self._take_over(chunk)
            path.unlink()

    def finish(self, ids: Sequence[str | int], *, in_order: bool) -> None:
        """Settle at the end of a job, and check that every input has its row; called on one process.

        Args:
            ids: id of each input.
            in_order: whether to bring the rows into this order, for an output that has one.

        Raises:
            OSError: rows are missing.
        """
        self.settle()
        there = set(self.ids())
        missing = [id for id in ids if str(id) not in there]
        if missing:
            raise OSError(
                f"{self.path}: expected {len(ids)} rows, got {len(ids) - len(missing)}, for example none for "
                f"{missing[0]}: another program has changed the output; repeat the command"
            )
        if in_order:
            self._sort(ids)

    @abstractmethod
    def holds_anything(self) -> bool:
        """Return whether there is content, whosever it is."""

    @abstractmethod
    def expect_own(self) -> None:
        """Check that the content may be a job's, without changing it.

        Raises:
            ValueError: it is not.
        """

    @abstractmethod
    def remove(self) -> None:
        """Remove the output.

        Raises:
            ValueError: there are files that no job writes.
        """

    @abstractmethod
    def _sort(self, ids: Sequence[str | int]) -> None:
        """Bring the rows into this order, in an output that has one."""

    @abstractmethod
    def _journals(self) -> list[Path]:
        """Return the files of rows that are not yet in the output."""

    @abstractmethod
    def _take_over(self, rows: list[Row]) -> None:
        """Add rows to the output and sync it to disk."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Return the ids of all rows of the output."""

    @abstractmethod
    def open(self, rank: int, world_size: int) -> Journal:
        """Return the journal of one process; all processes must open theirs before any of them writes."""


class JsonlOutput(Output):
    """A file of JSON lines. A single process appends to it, several processes to files next to it.

    Args:
        fields: fields of the rows.
    """

    def __init__(self, path: Path, fields: Sequence[str]):
        super().__init__(path)
        self.fields = fields

    def holds_anything(self) -> bool:
        return any(path.exists() and path.stat().st_size for path in (self.path, *self._journals()))

    def expect_own(self) -> None:
        for path in (self.path, *self._journals()):
            if path.exists():
                expect_rows(path, self.fields)

    def remove(self) -> None:
        for path in (Path(os.path.realpath(self.path)), *self._journals()):
            path.unlink(missing_ok=True)

    def settle(self) -> None:
        if self.path.exists():
            Journal(self.path).close()
        super().settle()

    def ids(self) -> Iterator[str]:
        return (str(row["id"]) for row in read_rows(self.path)) if self.path.exists() else iter(())

    def open(self, rank: int, world_size: int) -> Journal:
        path = self.path if world_size == 1 else self.path.with_name(f"{self.path.name}.rank-{rank:05d}")
        return Journal(path)

    def _journals(self) -> list[Path]:
        return _named(self.path.parent, re.compile(re.escape(self.path.name) + r"\.rank-\d{5,}"))

    def _take_over(self, rows: list[Row]) -> None:
        journal = Journal(self.path)
        journal.append(rows)
        journal.close()

    def _sort(self, ids: Sequence[str | int]) -> None:
        places: dict[str, tuple[int, int]] = {}
        start = 0
        with opened(self.path) as file:
            for line, row in zip(file, read_rows(self.path), strict=True):
                places[str(row["id"])] = (start, len(line))
                start += len(line)
        wanted = {str(id): None for id in ids}
        wanted |= dict.fromkeys(places)  # rows of other ids come last
        if list(wanted) == list(places):
            return
        with (
            whole_file(self.path, locked=True) as unfinished,
            naming_path(self.path),
            self.path.open("rb") as old,
            unfinished.open("wb") as new,
        ):
            for id in wanted:
                start, size = places[id]
                old.seek(start)
                new.write(old.read(size))


class ParquetOutput(Output):
    """A directory of Parquet files, which readers of Parquet treat as one table.

    Args:
        fields: fields of the rows.
        rows_per_part: rows per file; files written at the start or end of a run may have fewer.
    """

    def __init__(self, path: Path, fields: Sequence[str], rows_per_part: int):
        require("parquet", "pyarrow")
        super().__init__(path)
        self.schema = _schema(fields)
        self.rows_per_part = rows_per_part

    def settle(self) -> None:
        for path in _named(self.path, _LEFT):
            path.unlink()
        super().settle()

    def holds_anything(self) -> bool:
        return any(
            path.stat().st_size or not _JOURNAL_NAME.fullmatch(path.name)
            for path in _named(self.path, re.compile(".*"))
        )

    def expect_own(self) -> None:
        for path in self._journals():
            expect_rows(path, self.schema.names)
        for part in self._parts():
            with _opened(part) as file:
                if file.schema_arrow.names != self.schema.names:
                    raise ValueError(
                        f"{part}: expected the columns {', '.join(self.schema.names)}, "
                        f"got {', '.join(file.schema_arrow.names)}"
                    )

    def remove(self) -> None:
        entries = _named(self.path, re.compile(".*"))
        for path in entries:
            if not any(name.fullmatch(path.name) for name in (_PART_NAME, _JOURNAL_NAME, _LEFT)):
                raise ValueError(f"out: expected a directory of a job's files alone, got {self.path} with {path.name}")
        for path in entries:
            path.unlink()
        if self.path.is_dir():
            self.path.rmdir()

    def ids(self) -> Iterator[str]:
        for part in self._parts():
            with naming(part, "a readable Parquet file"), _opened(part) as file:
                ids = file.read(columns=["id"])["id"].to_pylist()
            yield from map(str, ids)

    def _sort(self, ids: Sequence[str | int]) -> None:
        """Leave the rows as they are: a table of several files has no order."""

    def open(self, rank: int, world_size: int) -> "_PartJournal":
        return _PartJournal(self, self.path / JOURNAL_SUFFIX.format(rank), self._next_part() + rank, world_size)

    def write_part(self, number: int, rows: list[Row]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        part = self.path / PART.format(number)
        table = pa.Table.from_pylist([{**row, "id": str(row["id"])} for row in rows], schema=self.schema)
        with whole_file(part, overwrite=False) as unfinished, naming_path(part):
            pq.write_table(table, unfinished)

    def _parts(self) -> list[Path]:
        return _named(self.path, _PART_NAME)

    def _next_part(self) -> int:
        return max((int(part.stem.removeprefix("part-")) + 1 for part in self._parts()), default=0)

    def _journals(self) -> list[Path]:
        return _named(self.path, _JOURNAL_NAME)

    def _take_over(self, rows: list[Row]) -> None:
        self.write_part(self._next_part(), rows)


class _PartJournal(Journal):
    """A journal that holds the rows of one process until they fill a part."""

    def __init__(self, output: ParquetOutput, path: Path, number: int, step: int):
        super().__init__(path)
        self.output, self.number, self.step = output, number, step
        self.rows: list[Row] = []

    def append(self, rows: Sequence[Row]) -> None:
        super().append(rows)
        self.rows += rows
        if len(self.rows) >= self.output.rows_per_part:
            self.output.write_part(self.number, self.rows)
            self.number += self.step
            self.rows = []
            self.clear()


def open_output(path: Path, fields: Sequence[str], rows_per_part: int = ROWS_PER_PART) -> Output:
    """Return the output for a path, by its suffix.

    Raises:
        ValueError: the path is anything but a directory for Parquet, or anything but a file for JSON lines.
        MissingExtraError: pyarrow is not installed, for Parquet.
    """
    if path.suffix == ".parquet":
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: expected a directory for Parquet files, got the file {path}")
        return ParquetOutput(path, fields, rows_per_part)
    if path.is_dir():
        raise ValueError(f"out: expected a file, got the directory {path}")
    if path.exists() and not path.is_file():
        raise ValueError(f"out: expected a file, got the pipe or device {path}")
    return JsonlOutput(path, fields)


def _named(directory: Path, pattern: re.Pattern) -> list[Path]:
    names = os.listdir(directory) if directory.is_dir() else ()
    return [directory / name for name in sorted(names) if pattern.fullmatch(name)]


def _opened(part: Path) -> Any:
    """Open a Parquet file.

    Raises:
        ValueError: it is none.
    """
    import pyarrow.parquet as pq

    with naming(part, "a readable Parquet file"):
        return pq.ParquetFile(part)


def _schema(fields: Sequence[str]) -> Any:
    import pyarrow as pa

    types = {"tags": pa.list_(pa.string()), "boxes": pa.list_(pa.list_(pa.float64()))}
    return pa.schema([(name, types.get(name, pa.string())) for name in fields])
