"""Runs the clone's benchmarks in a process of their own, and keeps what it measured even if it dies."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.results import Run, describe_machine, make_entry, save

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"


def suites() -> list[str]:
    """The names of all suites."""
    return sorted(file.stem.removeprefix("bench_") for file in FOLDER.glob("bench_*.py"))


def run(names: Sequence[str], out: Path | None, seconds: float | None, quick: bool) -> tuple[Path | None, int]:
    """Runs the suites `names`, all if empty, and writes their results.

    Args:
        out: where DEVICE/DATE-COMMIT goes; benchmarks/results if None.
        seconds: after this time no further benchmark begins.
        quick: few calls of everything: shows that it runs, measures nothing.

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
    records = out / f"records-{os.getpid()}.jsonl"  # stays if this process dies
    records.write_text(json.dumps(described) + "\n", encoding="utf-8")
    # Within a test on several processes, whose workers a benchmark takes for its own and then does not measure.
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
        except KeyboardInterrupt:  # pytest has it too, and ends with what it has
            status = process.wait()
    written = _collect(records, out)
    return written, status if written else status or 1


def recover(out: Path) -> list[Path]:
    """Makes results of the records that runs which died have left in `out`, and returns the folders they went to."""
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
    """The results of a file with the machine in its first line and a benchmark in each that follows."""
    text = records.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be cut off
    written = save(Run(lines[0], tuple(map(make_entry, lines[1:]))), out) if len(lines) > 1 else None
    records.unlink()
    return written
