"""Ctrl-C ends a command with status 130 and no traceback, whenever it comes."""

import os
import subprocess
import sys

import pytest

from tests.lion_fast.processes import import_path

# Interrupts the process when it imports a module, or when a file is opened.
RUN = """
import os, runpy, signal, sys
where = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background

def interrupt(event, arguments):
    if event == ("open" if "/" in where else "import") and str(arguments[0]).endswith(where):
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
runpy.run_module("lion_fast", run_name="__main__", alter_sys=True)
"""


CHECK, SCENES = ["data", "check", "s.jsonl"], ["data", "scenes", "--count", "2", "--out", "made"]


@pytest.mark.parametrize(
    ("where", "command"),
    [
        ("lion_fast.cli", CHECK),
        ("lion_fast.cli.train", CHECK),
        ("lion_fast.data.converters", SCENES),
        ("lion_fast.scenes.drawing", SCENES),
        ("/images/000001.png", SCENES),
    ],
)
def test_ctrl_c_at_any_moment(tmp_path, where: str, command: list[str]) -> None:
    (tmp_path / "s.jsonl").write_text("{}\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN, where, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.suffix == ".jsonl"][1:]
