"""A command in a process of its own, where it matters how the kernels were imported."""

import argparse
import os
import subprocess
import sys


def run_again(args: argparse.Namespace, *, interpret: bool) -> int:
    """The exit status of the same command line, its kernels interpreted or compiled.

    That is settled when triton is imported, which the command line has done by the time it knows.
    """
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, "-m", "lion_fast", *args.argv]
    return subprocess.run(command, env=environment, check=False).returncode
