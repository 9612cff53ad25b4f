"""The main kernels' distance from their floor, explained by GPU counters: DRAM, matrix units, stalls, occupancy.

    ncu --profile-from-start off --csv --page raw --log-file RAW ... python -m benchmarks.counters
    python -m benchmarks.counters --read RAW --out RESULTS

The first command runs each of `SEGMENTS` once under ncu (`benchmarks/gpu.sh OUT counters` has its options), with a
marker before each; the second writes RESULTS/DEVICE/DATE-COMMIT/ncu.json and prints a table. Without a GPU, the first
runs the same calls at small sizes, and counts nothing.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_headline import OURS, ROWS, suite_of
from benchmarks.harness.results import COUNTERS, describe_machine, run_folder
from benchmarks.harness.runs import ROOT
from benchmarks.harness.side_by_side import DEVICE, turn
from lion_fast.io.atomic import write_json

OPERATORS = ("mixture_of_adapters", "multi_scale_attention", "relative_bias_attention")
MARKER = "spin_kernel"  # launched by torch.cuda._sleep
# The metrics that explain a gap, of the several hundred in ncu's sections.
METRICS = re.compile(
    r"gpu__time_duration\.sum"
    r"|(gpu__)?dram__?(throughput|bytes)\S*\.(sum|avg\.pct_of_peak_sustained_elapsed|sum\.per_second)"
    r"|(sm|gpu)__(compute_memory_)?throughput\.avg\.pct_of_peak_sustained_elapsed"
    r"|sm__(inst_executed_)?pipe_tensor\S*\.pct_of_peak_sustained_active"
    r"|smsp__average_warps_issue_stalled_\w+_per_issue_active\.ratio"
    r"|smsp__issue_active\.avg\.pct_of_peak_sustained_active"
    r"|sm__warps_active\.avg\.pct_of_peak_sustained_active"
    r"|lts__t_sector_hit_rate\.pct"
    r"|launch__(registers_per_thread|waves_per_multiprocessor|grid_size|block_size|occupancy_limit_\w+)"
)
STALL = re.compile(r"issue_stalled_(\w+?)_per_issue_active")
COUNTED = [next(row for row in ROWS if row.operator == operator) for operator in OPERATORS]
SEGMENTS = tuple((row, direction) for row in COUNTED for direction in row.directions)  # whose kernels are counted


def run() -> None:
    """Run every segment once, warm, with the profiler on from before its marker to its end."""
    for row in COUNTED:
        suite = suite_of(row)
        inputs = suite.make_inputs()
        for direction in row.directions:
            prepare, call = turn(suite.operators[OURS], inputs, direction)
            for _ in range(2):
                call(prepare() if prepare else None)
            given = prepare() if prepare else None
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                torch.cuda._sleep(1)
            call(given)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            print(f"ran {row.operator}, {direction}", flush=True)


def kernels_of(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield each kernel of ncu's raw CSV, in base units: operator, shape, direction, name and metrics by ncu's names.

    Raises:
        ValueError: there is no table, or the numbers of markers and segments differ.
    """
    table = list(csv.DictReader(line for line in lines if line.startswith('"')))
    if not table or "Kernel Name" not in table[0]:
        raise ValueError("expected ncu's raw page as CSV, got no table with 'Kernel Name'")
    rows = table[1:]  # the first row below the header has the units
    markers = sum(MARKER in row["Kernel Name"] for row in rows)
    if not 0 < markers <= len(SEGMENTS):  # fewer if it was cut off
        raise ValueError(f"expected 1 to {len(SEGMENTS)} markers ({MARKER}) among {len(rows)} kernels, got {markers}")
    segments = iter(SEGMENTS)
    headline, direction = SEGMENTS[0]
    for row in rows:
        if MARKER in row["Kernel Name"]:
            headline, direction = next(segments)
            continue
        metrics = {
            name: float(value.replace(",", ""))
            for name, value in row.items()
            if name and METRICS.fullmatch(name) and _is_number(value)
        }
        yield {
            "kernel": row["Kernel Name"],
            "operator": headline.operator,
            "label": headline.label,
            "direction": direction,
            "metrics": metrics,
        }


def _is_number(text: str | None) -> bool:
    return text is not None and re.fullmatch(r"-?[\d,]+(\.\d+)?", text) is not None


def table(kernels: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield a line per kernel: time, shares of DRAM's and matrix units' peak, occupancy, and three longest stalls."""
    yield f"{'kernel':<44} {'us':>8} {'DRAM':>5} {'matrix':>6} {'warps':>5}  warps stalled for each that issues"
    for kernel in kernels:
        metrics = kernel["metrics"]
        stalls = sorted(
            ((value, match[1]) for name, value in metrics.items() if (match := STALL.search(name))), reverse=True
        )
        yield (
            f"{kernel['kernel'][:44]:<44} {_microseconds(metrics):>8} {_share(metrics, 'dram_?_?throughput'):>5} "
            f"{_share(metrics, 'pipe_tensor'):>6} {_share(metrics, 'warps_active'):>5}  "
            + ", ".join(f"{name} {value:.1f}" for value, name in stalls[:3])
        )


def _microseconds(metrics: dict[str, float]) -> str:
    nanoseconds = metrics.get("gpu__time_duration.sum")
    return "" if nanoseconds is None else f"{nanoseconds / 1e3:.1f}"


def _share(metrics: dict[str, float], pattern: str) -> str:
    found = [value for name, value in metrics.items() if re.search(rf"{pattern}\S*\.avg\.pct", name)]
    return f"{max(found):.0f}%" if found else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--read", type=Path, metavar="RAW", help="ncu's raw page as CSV")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (DEVICE/DATE-COMMIT/ncu.json)")
    options = parser.parse_args(arguments)
    if options.read is None:
        run()
        return 0
    if options.out is None:
        parser.error("--read needs --out")
    with options.read.open(encoding="utf-8") as file:
        kernels = list(kernels_of(file))
    machine = describe_machine(ROOT)
    folder = run_folder(options.out, machine)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COUNTERS, {"environment": machine, "kernels": kernels})
    for line in table(kernels):
        print(line)
    counted = {(kernel["operator"], kernel["direction"]) for kernel in kernels}
    missing = [(row.operator, direction) for row, direction in SEGMENTS if (row.operator, direction) not in counted]
    for operator, direction in missing:
        print(f"not counted: {operator}, {direction}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
