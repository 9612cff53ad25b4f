"""Running a command again in a new process, with another mode of the kernels."""

import argparse
import os
import subprocess
import sys


def run_again(args: argparse.Namespace, *, interpret: bool) -> int:
    """Run the same command line with interpreted or compiled kernels, and return its exit status.

    The mode is fixed when triton is imported, which has already happened in this process.
    """
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, "-m", "lion_fast", *args.argv]
    return subprocess.run(command, env=environment, check=False).returncode
