"""Runs of the benchmarks in a separate process, whose measurements survive its death."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.results import Run, describe_machine, make_entry, save
from lion_fast.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"


def suites() -> list[str]:
    """Return the names of all suites."""
    return sorted(file.stem.removeprefix("bench_") for file in FOLDER.glob("bench_*.py"))


def run(names: Sequence[str], out: Path | None, seconds: float | None, quick: bool) -> tuple[Path | None, int]:
    """Run the suites `names`, or all if empty, and write their results.

    Args:
        out: parent of DEVICE/DATE-COMMIT; benchmarks/results if None.
        seconds: time after which no further benchmark starts.
        quick: few calls of everything, as a functional check without measurement.

    Returns:
        The folder with the results, None if there are none, and pytest's exit status.

    Raises:
        ValueError: no such suite.
    """
    known = suites()
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"suites: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    described = describe_machine(ROOT)
    out = (out or FOLDER / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    recover(out)
    records = out / f"records-{os.getpid()}.jsonl"  # survives if this process dies
    write_text(records, json.dumps(described) + "\n")
    # Without these, a benchmark inside a test run on several processes takes itself for a worker and does not measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["LION_BENCH_RECORDS"] = str(records)
    environment["PYTHONPATH"] = os.pathsep.join(
        [".", "kernels", "reference", *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if seconds is not None:
        environment["LION_BENCH_DEADLINE"] = str(time.time() + seconds)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-columns=median"]
    if quick:
        environment["LION_BENCH_SECONDS"] = "0"
        command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    command += [f"benchmarks/bench_{name}.py" for name in names or known]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # pytest receives it too, and ends with its results so far
            status = process.wait()
    written = _collect(records, out)
    return written, status if written else status or 1


def recover(out: Path) -> list[Path]:
    """Convert the records that dead runs left in `out` to results, and return their folders."""
    found = [(file, file.stem.removeprefix("records-")) for file in sorted(out.glob("records-*.jsonl"))]
    left = [file for file, process in found if process.isdigit() and not _runs(int(process))]
    return [folder for file in left if (folder := _collect(file, out))]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _collect(records: Path, out: Path) -> Path | None:
    """Return the results of a file with the machine in its first line and a benchmark in each further line."""
    text = records.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last line may be incomplete
    written = save(Run(lines[0], tuple(map(make_entry, lines[1:]))), out) if len(lines) > 1 else None
    records.unlink()
    return written
