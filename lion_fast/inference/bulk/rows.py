"""The rows of a bulk job as lines of JSON, and the file that a process appends them to."""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lion_fast.io.owning import OutputInUseError
from lion_fast.io.reading import brief, naming_path, opened

Row = dict[str, Any]

_TAIL = 1 << 16
_BEGIN = b'{"id": '  # of every row


class Journal:
    """A file of JSON lines that one process appends to; opening it removes a truncated last line.

    Raises:
        OutputInUseError: another process has the file open.
        OSError: the file cannot be written; or, when rows are appended or it is closed, another program has removed,
            replaced or changed it.
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
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise OutputInUseError(f"out: expected a file that no other process is writing, got {path}") from error
        with naming_path(path):
            self._size = _end_of_last_line(self._file)
            self._file.truncate(self._size)
            self._file.seek(self._size)

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows and sync them to disk."""
        content = memoryview(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self._expect_unchanged()
        self._size += len(content)
        with naming_path(self.path):
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Remove all rows."""
        with naming_path(self.path):
            self._file.truncate(0)
            self._file.seek(0)
        self._size = 0

    def close(self) -> None:
        with naming_path(self.path):
            self._file.close()

    def _expect_unchanged(self) -> None:
        ours = os.fstat(self._file.fileno())
        try:
            there = os.path.samestat(ours, os.stat(self.path))
        except FileNotFoundError:
            there = False
        if not there or ours.st_size != self._size:
            raise OSError(
                f"{self.path}: expected the file to stay as it is until the job ends, but another program has "
                f"{'changed' if there else 'removed or replaced'} it"
            )


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines.

    Raises:
        ValueError: a line is not a row.
    """
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            yield _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, place: str, fields: Iterable[str] = ("id",)) -> Row:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not an object")
        for name in fields:
            if name not in row:
                raise ValueError(f"{name}: missing")
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise ValueError("id: expected text or a whole number")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a row of a bulk job ({brief(error)})") from error
    return row


def expect_rows(path: Path, fields: Sequence[str]) -> None:
    """Check that a file begins with a row with these fields, and ends with one or with a part of one.

    Raises:
        ValueError: it does not, so no job has written it.
    """
    with opened(path) as file:
        first = file.readline()
        end = _end_of_last_line(file)
        file.seek(end)
        torn = file.read(_TAIL)
    if end:
        _parsed(first, f"{path}:1", fields)
        torn = torn.rstrip(b"\0")  # a machine that stops may leave zeros
    if not torn.startswith(_BEGIN[: len(torn)]):
        raise ValueError(f"{path}: not a file of a bulk job: it ends with {torn[:40]!r}")


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
