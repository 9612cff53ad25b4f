"""Helpers for tests of the ahead-of-time report: a report without complaints, and a process that compiles kernels."""

import os
import subprocess
import sys
from pathlib import Path

from lion_kernels.aot.compile import KernelSpec, Report

SPEC = KernelSpec("k", None, {}, {}, num_warps=4, num_stages=3, matrix=True)
GOOD = Report(
    "k",
    "sm_90",
    registers=120,
    stack_bytes=0,
    shared_bytes=98304,
    matrix_instructions=4,
    wide_accesses=8,
    narrow_accesses=2,
    programs=4,
    limit="registers",
    loop={"wgmma": 8, "wait": 2, "copy ahead": 10, "float": 70},
    chained=(6, 0),
)


def run_uninterpreted(*command: str | Path) -> subprocess.CompletedProcess:
    """Run Python in a new process that compiles kernels, since this one may interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
