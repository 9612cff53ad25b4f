"""SIGKILL, errors of the kernel and other programs at chosen file operations, by a small library for LD_PRELOAD."""

import shutil
import subprocess
from pathlib import Path

KILL, REMOVE, TRUNCATE = "kill", "remove", "truncate"


def build(folder: Path) -> Path | None:
    """Compile the library; return None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def environment(
    folder: str | Path,
    at: int = 0,
    fault: str | int = KILL,
    *,
    on: str = "writes",
    count: str | Path | None = None,
) -> dict[str, str]:
    """Return variables that bring a fault to a process that has the library preloaded.

    Args:
        folder: text in the paths of the operations that count.
        at: number of the operation with the fault, counted from 1; 0 for none.
        fault: `KILL` for SIGKILL, `REMOVE` or `TRUNCATE` for what another program does to the operation's file, or the
            errno of this operation and all later ones.
        on: "writes" for creating, writing, syncing, renaming and truncating, or "reads".
        count: file that gets a byte for each operation.
    """
    chosen = {"LION_FAULT_FOLDER": str(folder), "LION_FAULT_ON": on}
    if at:
        chosen |= {"LION_FAULT_AT": str(at), "LION_FAULT": str(fault)}
    if count is not None:
        chosen["LION_FAULT_COUNT"] = str(count)
    return chosen
