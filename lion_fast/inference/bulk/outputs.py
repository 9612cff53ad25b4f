"""Outputs of a bulk job, which survive a kill at any byte and show which inputs remain.

Rows are appended to a file of JSON lines and synced to disk batch by batch. After a kill, the last line may be
truncated; it is removed, and its input is processed again. Each of several processes appends to its own file
(`captions.jsonl.rank-00001`), whose rows are moved into the output when the job starts and when it ends. Parquet files
cannot be appended to, so rows for Parquet also go to such a file first, and from there to `part-00000.parquet` and so
on, each written atomically.

Every step can be killed and repeated: a row is moved only if the output has no row with its id.
"""

import fcntl
import glob
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lion_fast.extras import require
from lion_fast.io.atomic import UNFINISHED, whole_file

Row = dict[str, Any]

_TAIL = 1 << 16
ROWS_PER_PART = 10_000


class Journal:
    """A file of JSON lines that one process appends to; opening it removes a truncated last line.

    Raises:
        ValueError: another process has the file open.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            # `lockf` locks belong to this process: forked workers, which may outlive it by seconds, do not hold them.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"out: expected a file that no other process is writing, got {path}") from error
        self._file.truncate(_end_of_last_line(self._file))
        self._file.seek(0, os.SEEK_END)

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows and sync them to disk."""
        content = memoryview(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        while content:
            content = content[self._file.write(content) :]
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Remove all rows."""
        self._file.truncate(0)
        self._file.seek(0)

    def close(self) -> None:
        self._file.close()


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
            rows = (row for row in read_rows(path) if row["id"] not in seen)
            while chunk := list(itertools.islice(rows, ROWS_PER_PART)):
                self._take_over(chunk)
            path.unlink()

    def began(self) -> bool:
        """Return whether the output has rows; call it after `settle`."""
        return next(iter(self.ids()), None) is not None

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
    """A file of JSON lines. A single process appends to it, several processes to files next to it."""

    def settle(self) -> None:
        if self.path.exists():
            Journal(self.path).close()
        super().settle()

    def ids(self) -> Iterator[str]:
        return (row["id"] for row in read_rows(self.path)) if self.path.exists() else iter(())

    def open(self, rank: int, world_size: int) -> Journal:
        path = self.path if world_size == 1 else self.path.with_name(f"{self.path.name}.rank-{rank:05d}")
        return Journal(path)

    def _journals(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank-*"))

    def _take_over(self, rows: list[Row]) -> None:
        journal = Journal(self.path)
        journal.append(rows)
        journal.close()


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
        for unfinished in self.path.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        super().settle()

    def ids(self) -> Iterator[str]:
        import pyarrow.parquet as pq

        for part in self._parts():
            yield from pq.read_table(part, columns=["id"])["id"].to_pylist()

    def open(self, rank: int, world_size: int) -> "_PartJournal":
        return _PartJournal(self, self.path / f"_rank-{rank:05d}.jsonl", self._next_part() + rank, world_size)

    def write_part(self, number: int, rows: list[Row]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with whole_file(self.path / f"part-{number:05d}.parquet") as unfinished:
            pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), unfinished)

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def _next_part(self) -> int:
        return max((int(part.stem.removeprefix("part-")) + 1 for part in self._parts()), default=0)

    def _journals(self) -> list[Path]:
        return sorted(self.path.glob("_rank-*.jsonl"))

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
        ValueError: the path is a file for Parquet or a directory for JSON lines.
        MissingExtraError: pyarrow is not installed, for Parquet.
    """
    if path.suffix == ".parquet":
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: expected a directory for Parquet files, got the file {path}")
        return ParquetOutput(path, fields, rows_per_part)
    if path.is_dir():
        raise ValueError(f"out: expected a file, got the directory {path}")
    return JsonlOutput(path)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines.

    Raises:
        ValueError: a line is not a row.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["id"]
            except (ValueError, TypeError, LookupError) as error:
                raise ValueError(f"{path}:{number}: not a row of a bulk job ({error})") from error
            yield row


def _schema(fields: Sequence[str]) -> Any:
    import pyarrow as pa

    types = {"tags": pa.list_(pa.string()), "boxes": pa.list_(pa.list_(pa.float64()))}
    return pa.schema([(name, types.get(name, pa.string())) for name in fields])


def _end_of_last_line(file: Any) -> int:
    """Return the number of bytes up to and including the last newline."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _TAIL)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
