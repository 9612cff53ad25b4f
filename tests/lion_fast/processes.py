"""Processes for tests to kill, forked from a server that has imported everything, so that they start at once."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def starting(script: Path, preload: Sequence[str]) -> Iterator[Callable[..., Any]]:
    """Provide a function that runs `script` in a process, with its keyword arguments as the dict `ARGUMENTS`.

    Args:
        preload: modules that the server imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))

    def begin(**arguments: Any) -> Any:
        process = context.Process(
            target=runpy.run_path,
            args=(str(script),),
            kwargs={"init_globals": {"ARGUMENTS": arguments}, "run_name": "__main__"},
        )
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:  # for the server, which starts with the first process
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield begin
