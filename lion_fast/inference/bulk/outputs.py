"""Where rows go: what is written stays whole through a kill at any byte, and says by itself what is left to do.

Rows are appended to a file of JSON lines and brought to the disk batch by batch. After a kill its last line may be
torn; it is cut off, and its input is done again. Processes of one job append to files of their own
(`captions.jsonl.rank-00001`), whose rows are moved into the output when the job begins and when it ends. Parquet, which
cannot be appended to, has such a file too; it is made into `part-00000.parquet` and so on, each written aside and
renamed.

Every step can be killed and done again: rows are moved only where the output has no row of that id yet.
"""

import fcntl
import glob
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lion_fast.extras import require
from lion_fast.io.atomic import UNFINISHED, whole_file

Row = dict[str, Any]

_TAIL = 1 << 16
ROWS_PER_PART = 10_000


class Journal:
    """A file of JSON lines that one process appends to; opening it cuts off a torn line.

    Raises:
        ValueError: another process has it open.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            # Of this process alone: workers that it forks, which may outlive it by seconds, do not hold the lock.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"out: expected a file that no other process is writing, got {path}") from error
        self._file.truncate(_end_of_last_line(self._file))
        self._file.seek(0, os.SEEK_END)

    def append(self, rows: Iterable[Row]) -> None:
        """Returns when the rows are on the disk."""
        content = memoryview(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        while content:
            content = content[self._file.write(content) :]
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Drop all rows."""
        self._file.truncate(0)
        self._file.seek(0)

    def close(self) -> None:
        self._file.close()


class Writer(Protocol):
    """What a process writes through."""

    def append(self, rows: Sequence[Row]) -> None:
        """Returns when the rows are on the disk."""

    def close(self) -> None: ...


class Output(ABC):
    """What the processes of a job write together.

    Args:
        path: of the output.
    """

    def __init__(self, path: Path):
        self.path = path

    def settle(self) -> None:
        """Repair what a kill has left, and move the rows of all processes into the output. For one process, alone."""
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
        """Whether there are rows; to be asked when the output is settled."""
        return next(iter(self.ids()), None) is not None

    @abstractmethod
    def _journals(self) -> list[Path]:
        """Files of rows that are not in the output yet."""

    @abstractmethod
    def _take_over(self, rows: list[Row]) -> None:
        """Put rows on the disk as part of the output."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Of all rows of the output."""

    @abstractmethod
    def open(self, rank: int, world_size: int) -> Writer:
        """All processes open theirs before any of them writes."""


class JsonlOutput(Output):
    """One file of JSON lines. A process that is alone appends to it, several to files beside it."""

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
    """A folder of Parquet files, which readers of Parquet take for one table.

    Args:
        fields: of the rows.
        rows_per_part: rows that a file has; files written when a run begins or ends may have fewer.
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

    def open(self, rank: int, world_size: int) -> "_PartWriter":
        return _PartWriter(self, self.path / f"_rank-{rank:05d}.jsonl", self._next_part() + rank, world_size)

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


class _PartWriter:
    """One process's rows: in its journal until they are enough for a part."""

    def __init__(self, output: ParquetOutput, path: Path, number: int, step: int):
        self.output, self.path, self.number, self.step = output, path, number, step
        self.rows: list[Row] = []
        self.journal = Journal(path)

    def append(self, rows: Sequence[Row]) -> None:
        self.journal.append(rows)
        self.rows += rows
        if len(self.rows) >= self.output.rows_per_part:
            self.output.write_part(self.number, self.rows)
            self.number += self.step
            self.rows = []
            self.journal.clear()

    def close(self) -> None:
        self.journal.close()


def open_output(path: Path, fields: Sequence[str], rows_per_part: int = ROWS_PER_PART) -> Output:
    """The output that a path's ending stands for.

    Raises:
        ValueError: something of another kind is there, or pyarrow is missing.
    """
    if path.suffix == ".parquet":
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: expected a folder for Parquet files, got the file {path}")
        return ParquetOutput(path, fields, rows_per_part)
    if path.is_dir():
        raise ValueError(f"out: expected a file, got the folder {path}")
    return JsonlOutput(path)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines.

    Raises:
        ValueError: for a line that is no row.
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
    """Bytes up to the last newline, and with it."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _TAIL)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
