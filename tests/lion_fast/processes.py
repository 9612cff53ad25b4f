"""Processes: those to kill or to connect, forked from a server that has imported everything, and Python anew."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 300  # seconds to wait for a process: ends a hang, and is long enough for a busy machine


@contextmanager
def starting(script: Path, preload: Sequence[str]) -> Iterator[Callable[..., Any]]:
    """Provide a function that runs `script` in a process, with its keyword arguments as the dict `ARGUMENTS`.

    Args:
        preload: modules that the server imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, "tests.lion_fast.warm"])

    def begin(**arguments: Any) -> Any:
        process = context.Process(
            target=runpy.run_path,
            args=(str(script),),
            kwargs={"init_globals": {"ARGUMENTS": arguments}, "run_name": "__main__"},
        )
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:  # for the server, which starts with the first process
        patch.setenv("PYTHONPATH", import_path())
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the other check initializes CUDA, which forbids forks
        yield begin


def import_path() -> str:
    return os.pathsep.join(path for path in sys.path if path)


def finish(*processes: Any) -> None:
    for process in processes:
        process.join(timeout=PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(processes)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_python(*arguments: Any, **environment: str) -> str:
    """Run Python with this process's import path, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": import_path()} | environment,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
