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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.bench_headline import OURS, ROWS, case_of
from benchmarks.harness.headline import Headline
from benchmarks.harness.results import COUNTERS, describe_machine, run_folder
from benchmarks.harness.runs import ROOT
from benchmarks.harness.side_by_side import DEVICE, Operator
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


class Segment(NamedTuple):
    """A call whose kernels are counted."""

    row: Headline
    direction: str


COUNTED = [next(row for row in ROWS if row.operator == operator) for operator in OPERATORS]
SEGMENTS = tuple(Segment(row, direction) for row in COUNTED for direction in row.directions)


def run() -> None:
    """Run every segment once, warm, with the profiler on from before its marker to its end."""
    for row in COUNTED:
        calls = calls_of(row)
        for direction in row.directions:
            prepare, call = calls[direction]
            for _ in range(2):
                call(prepare())
            given = prepare()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                torch.cuda._sleep(1)
            call(given)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            print(f"ran {row.operator}, {direction}", flush=True)


def calls_of(row: Headline) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return, by direction, the preparation and the counted call."""
    case = case_of(row)
    operator: Operator = case.suite.operators[OURS]
    inputs = case.make_inputs()
    wanted = [value for value in inputs.values() if value.requires_grad]
    grad = torch.randn_like(operator(**inputs))

    def without_gradients(_: Any) -> Any:
        with torch.no_grad():
            return operator(**{name: value.detach() for name, value in inputs.items()})

    return {
        "forward": (lambda: None, without_gradients),
        "backward": (lambda: operator(**inputs), lambda out: torch.autograd.grad(out, wanted, grad)),
    }


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
    segment = SEGMENTS[0]
    for row in rows:
        if MARKER in row["Kernel Name"]:
            segment = next(segments)
            continue
        metrics = {
            name: float(value.replace(",", ""))
            for name, value in row.items()
            if name and METRICS.fullmatch(name) and _is_number(value)
        }
        yield {
            "kernel": row["Kernel Name"],
            "operator": segment.row.operator,
            "label": segment.row.label,
            "direction": segment.direction,
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
    missing = [segment for segment in SEGMENTS if (segment.row.operator, segment.direction) not in counted]
    for segment in missing:
        print(f"not counted: {segment.row.operator}, {segment.direction}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
