"""SIGKILL and errors of the kernel at chosen file operations of a process, by a small library for LD_PRELOAD."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KILL = "kill"


def build(folder: Path) -> Path:
    """Compile the library; skip the test without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, which is not installed")
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def environment(library: Path, folder: str | Path, at: int = 0, fault: str | int = KILL, count: Path | None = None):
    """Return the environment of a process with a fault.

    Args:
        folder: text in the paths of the operations that count: writing, creating, syncing, renaming, truncating.
        at: number of the operation with the fault, counted from 1; 0 for none.
        fault: `KILL` for SIGKILL, or the errno of this operation and all later ones.
        count: file that gets a byte for each operation.
    """
    chosen = {"LD_PRELOAD": str(library), "LION_FAULT_FOLDER": str(folder)}
    if at:
        chosen |= {"LION_FAULT_AT": str(at), "LION_FAULT": str(fault)}
    if count is not None:
        chosen["LION_FAULT_COUNT"] = str(count)
    return os.environ | chosen
