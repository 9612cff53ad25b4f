"""Standard streams of commands: closed, full, without a reader, and of an encoding that lacks what is printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lion_fast.processes import import_path

COMMAND = [sys.executable, "-m", "lion_fast"]


def shell(line: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": import_path()} | environment
    done = subprocess.run(["bash", "-c", line, "bash", *arguments], env=environment, cwd=cwd, capture_output=True)
    return done


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Messages of libraries would be written into it."""
    script = (
        "import os, sys; from lion_fast.streams import prepare; prepare(); file = open('rows', 'w'); print('said');"
        "os.write(1, b'noise'); os.write(2, b'noise'); print(file.fileno() > 2, file=file); sys.stderr.write('noise');"
        "assert sys.stdin.read() == ''; file.write(str(os.get_inheritable(1)))"
    )
    done = shell('"$@" <&- >&- 2>&-', sys.executable, "-c", script, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "rows").read_text() == "True\nTrue"


def test_a_reader_that_leaves_is_no_error() -> None:
    done = shell(
        '("$@"; echo status $? >&2) | python3 -c "import os; os.close(0); print()"',
        *COMMAND,
        *("train", "--stage", "1", "--print-recipe"),
    )
    assert done.stderr in (b"status 141\n", b"status 0\n")  # 0 if all was written before the reader left


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_output_is_an_error() -> None:
    done = shell('"$@" > /dev/full', *COMMAND, "train", "--stage", "1", "--print-recipe")
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr
    assert b"Exception" not in done.stderr


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell('rmdir "$PWD"; exec "$@"', *COMMAND, "data", "check", "a.jsonl", cwd=tmp_path / "gone")
    assert (done.returncode, done.stderr) == (
        2,
        b"lion-fast: the working directory no longer exists; change to another\n",
    )
