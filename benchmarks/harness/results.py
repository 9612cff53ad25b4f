"""The files of a run: DEVICE/DATE-COMMIT/SUITE.json, each with the machine, the versions and the commit."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lion_fast.check.environment import environment
from lion_fast.io.atomic import write_json

FORMAT = 1
COUNTERS = "ncu.json"  # beside a GPU's results: its profiler's counters of single launches
OURS = "lion"  # prefix of this project's peers
DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Entry:
    """One peer's time in one comparison.

    Attributes:
        suite: an operator's name or a part of the model.
        group: the comparison; its peers had the same inputs.
        seconds: median, 20 % and 80 % quantile of one call.
        rounds: number of calls.
        shape: sizes by name that distinguish the comparison from others of the suite.
        baseline, ratio: the peer that all took turns with, and the median, 20 % and 80 % quantile of the ratio to its
            time, round by round; None without turns.
        floor_seconds: lower bound of any implementation on this device, by its measured rates.
        peak_bytes, saved_bytes: peak memory of a call, and what forward saves for backward.
        error, bound: relative error of the result, and its bound.
        other: additional values that the benchmark recorded.
    """

    suite: str
    group: str
    peer: str
    seconds: tuple[float, float, float]
    rounds: int
    direction: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    baseline: str | None = None
    ratio: tuple[float, float, float] | None = None
    floor_seconds: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None
    bound: float | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.peer.startswith(OURS)

    @property
    def reached(self) -> float | None:
        """The share of the floor."""
        return self.floor_seconds / self.seconds[0] if self.floor_seconds else None

    @property
    def label(self) -> str:
        """The shape in words."""
        return ", ".join(f"{name} {value}" for name, value in self.shape.items()) or self.group


@dataclass(frozen=True)
class Run:
    """All measurements of one run of the benchmarks on one device.

    Attributes:
        counted: "kernel", "operator" and "metrics" (by ncu's names) of each kernel in the GPU's profile.
    """

    environment: dict[str, Any]
    entries: tuple[Entry, ...]
    counted: tuple[dict[str, Any], ...] = ()

    @property
    def device(self) -> str:
        return self.environment["device"]

    @property
    def title(self) -> str:
        return f"{self.device}, {self.environment['date']}, commit {self.environment['commit']}"


def make_entry(record: dict[str, Any]) -> Entry:
    """Return the entry of a line written by `benchmarks/conftest.py`."""
    names = {item.name for item in fields(Entry)} - {"other"}
    known = {name: value for name, value in record.items() if name in names}
    known["seconds"] = tuple(known["seconds"])
    if known.get("ratio") is not None:
        known["ratio"] = tuple(known["ratio"])
    other = {name: value for name, value in record.items() if name not in names}
    return Entry(**known, other=other.pop("other", {}) | other)


def describe_machine(folder: Path) -> dict[str, Any]:
    """Return the machine, the versions and the commit; `folder` is the measured clone.

    `LION_BENCH_COMMIT` gives the commit of a copy without its history.
    """
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    now, cpu = datetime.now(UTC), _cpu_name()
    return {
        **environment(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores",
        "cpu": cpu,
        "cpu_cores": os.cpu_count(),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "load_average": None if load is None else round(load[0], 2),
        "commit": os.environ.get("LION_BENCH_COMMIT")
        or _output(["git", "-C", str(folder), "describe", "--always", "--dirty"])
        or "unknown",
        "date": now.date().isoformat(),
        "started": now.isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return re.sub(r"\((R|TM|tm)\)", "", found[1]).strip() if found else platform.machine()


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_folder(folder: Path, described: dict[str, Any]) -> Path:
    """Return DEVICE/DATE-COMMIT under `folder` for a result of `describe_machine`."""
    return folder / _slug(described["device"]) / f"{described['date']}-{described['commit']}"


def save(run: Run, folder: Path) -> Path:
    """Write one file per suite to `folder`/DEVICE/DATE-COMMIT, and return that folder.

    A suite that is measured again replaces its file.
    """
    out = run_folder(folder, run.environment)
    out.mkdir(parents=True, exist_ok=True)
    for suite in dict.fromkeys(entry.suite for entry in run.entries):
        entries = [_lean(entry) for entry in run.entries if entry.suite == suite]
        content = {"format": FORMAT, "environment": run.environment, "entries": entries}
        write_json(out / f"{suite}.json", content)
    return out


def _lean(entry: Entry) -> dict[str, Any]:
    """Round numbers to four digits, beyond the precision of any measurement, and omit missing values."""
    return {name: _rounded(value) for name, value in asdict(entry).items() if value not in (None, "", {})}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def load(folder: Path) -> Run:
    """Load the run in `folder`, DEVICE/DATE-COMMIT.

    Raises:
        ValueError: there are no results, or some have another format.
    """
    files = sorted(file for file in folder.glob("*.json") if file.name != COUNTERS)
    if not files:
        raise ValueError(f"{folder}: expected a folder with results (SUITE.json), found none")
    entries, described = [], {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            described = content["environment"]
            entries += [make_entry(entry) for entry in content["entries"]]
            known = content["format"] == FORMAT
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: expected results of `python -m benchmarks.harness run` ({error!r})") from error
        if not known:
            raise ValueError(f"{file}: expected format {FORMAT}, got {content['format']}")
    return Run(described, tuple(entries), _counted(folder / COUNTERS))


def _counted(file: Path) -> tuple[dict[str, Any], ...]:
    if not file.exists():
        return ()
    try:
        kernels = json.loads(file.read_text(encoding="utf-8"))["kernels"]
        found = [{name: kernel[name] for name in ("kernel", "operator", "metrics")} for kernel in kernels]
        values = [value for kernel in found for value in kernel["metrics"].values()]
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected kernels with their operator and metrics ({error!r})") from error
    if wrong := [value for value in values if not isinstance(value, int | float)]:
        raise ValueError(f"{file}: expected numbers as metrics, got {wrong[0]!r}")
    return tuple(found)


def load_all(folder: Path) -> dict[str, list[Run]]:
    """Return the runs of every device under `folder`, newest first."""
    runs: dict[str, list[Run]] = {}
    for run in (load(path) for path in sorted(folder.glob("*/*")) if any(path.glob("*.json"))):
        runs.setdefault(run.device, []).append(run)
    return {device: sorted(of, key=lambda run: run.environment["started"], reverse=True) for device, of in runs.items()}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
