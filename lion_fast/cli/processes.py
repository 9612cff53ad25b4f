"""A command in a process of its own, where it matters how the kernels were imported."""

import os
import subprocess
import sys
from collections.abc import Sequence


def run_again(argv: Sequence[object], *, interpret: bool) -> int:
    """The exit status of `lion-fast` with `argv`, its kernels interpreted or compiled.

    That is settled when triton is imported, which the command line has done by the time it knows.
    """
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, "-m", "lion_fast", *map(str, argv)]
    return subprocess.run(command, env=environment, check=False).returncode
