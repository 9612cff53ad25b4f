"""Rows on disk: after any kill, every row exists once and is complete."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lion_fast.inference.bulk.outputs import Journal, Output, open_output
from tests.extras import needing
from tests.lion_fast.inference.bulk.inputs import by_id, rows_in

NEEDS_PYARROW = needing("pyarrow", "parquet")
NAMES = ["rows.jsonl", pytest.param("rows.parquet", marks=NEEDS_PYARROW)]
FIELDS = ("id", "caption", "error")


def rows(start: int, stop: int) -> list[dict]:
    return [{"id": f"ä{n:02}", "caption": f"a\n“{n}”", "error": None} for n in range(start, stop)]


def open_rows(path: Path) -> Output:
    return open_output(path, FIELDS, rows_per_part=4)


def test_a_line_truncated_at_any_byte_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path).append(rows(0, 3))
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        output = open_rows(path)
        output.settle()
        kept = sum(end <= size for end in ends)
        assert rows_in(path) == rows(0, kept)
        with closing(output.open(0, 1)) as writer:
            writer.append(rows(kept, 3))
        assert path.read_bytes() == whole


def test_a_long_truncated_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path).append(rows(0, 1))
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"id": "' + b"x" * 200_000)
    Journal(path).close()
    assert path.stat().st_size == size


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_several_processes_are_merged(tmp_path: Path, name: str) -> None:
    output = open_rows(tmp_path / name)
    output.settle()
    writers = [output.open(rank, 2) for rank in range(2)]
    for rank, writer in enumerate(writers):
        for start in range(20 * rank, 20 * rank + 13, 3):
            writer.append(rows(start, min(start + 3, 20 * rank + 13)))
        writer.close()
    output.settle()
    expected = rows(0, 13) + rows(20, 33)
    assert by_id(rows_in(output.path)) == expected
    assert sorted(output.ids()) == sorted(row["id"] for row in expected)
    found = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    # Each process wrote full parts; the remaining rows are in parts written at the end.
    parts = [f"part-{n:05d}.parquet" for n in range(6)]
    assert found == (parts if name == "rows.parquet" else [name])


@pytest.mark.parametrize("name", NAMES)
def test_moved_rows_are_not_moved_again(tmp_path: Path, name: str) -> None:
    """The kill comes after a journal's rows are moved and before the journal is removed."""
    output = open_rows(tmp_path / name)
    output.settle()
    with closing(output.open(1, 2)) as writer:
        writer.append(rows(0, 3))
    (journal,) = output._journals()
    before = journal.read_bytes()
    output.settle()
    journal.write_bytes(before + (json.dumps(rows(3, 4)[0]) + '\n{"id": ').encode())
    output.settle()
    assert rows_in(output.path) == rows(0, 4)
    assert not output._journals()


@NEEDS_PYARROW
def test_an_unfinished_part_is_removed(tmp_path: Path) -> None:
    output = open_rows(tmp_path / "rows.parquet")
    with closing(output.open(0, 1)) as writer:
        writer.append(rows(0, 2))
    (output.path / "part-00000.parquet.unfinished").write_bytes(b"PAR1")
    output.settle()
    assert rows_in(output.path) == rows(0, 2)


def test_only_one_process_can_open_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match=r"expected a file that no other process is writing, got .*rows.jsonl"):
            open_rows(path).settle()
        other.stdin.close()
    open_rows(path).settle()


def test_invalid_outputs_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"id": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"notes.jsonl:2: not a row of a bulk job"):
        list(open_rows(tmp_path / "notes.jsonl").ids())
    (tmp_path / "file.parquet").write_text("")
    with pytest.raises(ValueError, match="expected a directory for Parquet files"):
        open_rows(tmp_path / "file.parquet")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="expected a file, got the directory"):
        open_rows(tmp_path / "folder.jsonl")
