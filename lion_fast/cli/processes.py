"""Running a command again in a new process, with another mode of the kernels."""

import argparse
import os
import subprocess
import sys


def kernels_can_be(interpreted: bool) -> bool:
    """Select interpreted or compiled kernels, and return whether this process can have them.

    The mode is fixed when triton is imported. Until then, the environment selects it.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    from lion_kernels import interpreting

    return interpreting() == interpreted


def run_again(args: argparse.Namespace, *, interpret: bool) -> int:
    """Run the same command line with interpreted or compiled kernels, and return its exit status.

    For processes that have imported triton in the other mode (`kernels_can_be`).
    """
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, "-m", "lion_fast", *args.argv]
    return subprocess.run(command, env=environment, check=False).returncode
