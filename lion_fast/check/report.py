"""All cases in all dtypes: the tables and the JSON of `lion-fast check`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from lion_fast.check.cases import CASES, TIMED, Case
from lion_fast.check.compare import Outcome, compare, leaves, make_tensors, name_of
from lion_fast.check.environment import environment
from lion_fast.check.timing import Clock, Seconds, measure, measure_rates
from lion_fast.check.worker import Task, side_by_side
from lion_fast.io.atomic import write_json
from lion_kernels.core.backend import interpreting
from lion_kernels.core.cost import Device, floor_seconds

TIMED_DTYPE = torch.bfloat16
REPEATS_INTERPRETED = 2  # a call takes about a second there
REPEATS = 200
MOST_LARGE = 20  # on the model's own shapes, which take a hundred times as long


@dataclass(frozen=True)
class Timing:
    """A case's time in one direction and its floor, in seconds."""

    operator: str
    case: str
    direction: str
    seconds: Seconds
    floor: float


@dataclass
class Check:
    """All results; `problems` is empty if every operator is within its bounds.

    Attributes:
        expected: final number of outcomes.
    """

    backend: str
    expected: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    rates: Device | None = None

    @property
    def problems(self) -> list[str]:
        found = [f"{o.operator}, {o.case}, {o.dtype}: {problem}" for o in self.outcomes for problem in o.problems]
        missing = self.expected - len(self.outcomes)
        return found + ([f"{missing} of {self.expected} comparisons were not made"] if missing > 0 else [])

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": environment(),
            "backend": self.backend,
            "expected": self.expected,
            "problems": self.problems,
            "outcomes": [_finite(asdict(outcome)) for outcome in self.outcomes],
            "rates": self.rates and asdict(self.rates),
            "timings": [asdict(timing) for timing in self.timings],
        }


def _finite(outcome: dict[str, Any]) -> dict[str, Any]:
    """Replace infinity, which JSON lacks."""
    errors = {name: [error if isfinite(error) else None, bound] for name, (error, bound) in outcome["errors"].items()}
    return {**outcome, "errors": errors}


def run_check(
    operators: Sequence[str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    json_file: Path | None = None,
    *,
    processes: int = 1,
    repeats: int | None = None,
    times: bool = True,
) -> Check:
    """Compare `operators` with the reference in `dtypes` on `device`, and print the tables incrementally.

    On a CUDA device it also runs and times the model's own shapes. Elsewhere the kernels are interpreted. `json_file`
    receives all results, and partial ones if the check is interrupted.

    Args:
        processes: number of concurrent comparisons; times are measured by a single process.
        repeats: number of equal calls that must give equal bits. None means 200, or 2 in the interpreter and on the
            model's own shapes. On the latter there are at most 20.
        times: whether to measure times.
    """
    check = Check("interpreter" if interpreting() else "compiled")
    usual = REPEATS_INTERPRETED if interpreting() else REPEATS
    cases = [case for operator in operators for case in CASES if case.operator == operator]
    large = [case for operator in operators for case in TIMED if case.operator == operator]
    if device.type != "cuda" or TIMED_DTYPE not in dtypes:
        large = []
    tasks = [Task(case, dtype, repeats or usual) for case in cases for dtype in dtypes]
    tasks += [Task(case, TIMED_DTYPE, min(repeats or 2, MOST_LARGE)) for case in large]
    check.expected = len(tasks)
    try:
        print(f"{'':<64} {'dtype':<8} {'error':>8} {'bound':>8}  {'nearest its bound':<21} {'launches':>8}")
        _compare(check, tasks, device, processes)
        if times and large:
            check.rates = measure_rates(device, tuple(dtypes))
            _time(check, large, device)
    finally:
        if json_file is not None:
            write_json(json_file, check.to_json())
    for problem in check.problems:
        print(f"FAIL {problem}")
    wrong = sum(bool(outcome.problems) for outcome in check.outcomes)
    print(f"{len(check.outcomes) - wrong} of {check.expected} within bounds")
    return check


def _compare(check: Check, tasks: Sequence[Task], device: torch.device, processes: int) -> None:
    if processes > 1:
        # The most important tasks run first, in case time runs out, and among them the longest to compile.
        tasks = sorted(
            tasks,
            key=lambda task: (task.dtype != TIMED_DTYPE, task.dtype.itemsize, "attention" not in task.case.operator),
        )
        outcomes = side_by_side(tasks, device, processes)
    else:
        outcomes = (compare(task.case, task.dtype, device, repeats=task.repeats) for task in tasks)
    operator = None
    for outcome in outcomes:
        check.outcomes.append(outcome)
        if outcome.operator != operator:
            operator = outcome.operator
            print(operator)
        print(f"  {line(outcome)}", flush=True)


def line(outcome: Outcome) -> str:
    """Describe the tensor nearest to its bound, or furthest beyond it, and the number of kernels launched."""
    said = f"{outcome.case:<62} {outcome.dtype:<8}"
    if outcome.errors:
        tensor, (error, bound) = max(outcome.errors.items(), key=lambda entry: entry[1][0] / entry[1][1])
        said += f" {error:>8.1e} {bound:>8.1e}  {tensor:<21} {sum(outcome.kernels.values()):>8}"
    return f"{said}  FAIL" if outcome.problems else said


def _time(check: Check, cases: Sequence[Case], device: torch.device) -> None:
    """Time the cases with correct results; others have no time."""
    rates = check.rates
    assert rates is not None
    wrong = {(outcome.operator, outcome.case) for outcome in check.outcomes if outcome.problems}
    reached = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.flops_per_second.items())
    print(f"\n{rates.name}: copies {rates.bytes_per_second / 1e12:.2f} TB/s, multiplies {reached}")
    print(f"{'':<64} {'':<9} {'us':>8} {'20 %':>8} {'80 %':>8} {'floor':>8} {'reached':>7}")
    for case in cases:
        print(f"{case.operator}, {name_of(TIMED_DTYPE)}")
        if (case.operator, case.label) in wrong:
            print(f"  {case.label:<62} not measured: its result is wrong")
            continue
        try:
            for timing in _timings(case, rates, device):
                check.timings.append(timing)
                print(f"  {timing_line(timing)}", flush=True)
        except torch.OutOfMemoryError:
            print(f"  {case.label:<62} not measured: it does not fit this GPU's memory")


def _timings(case: Case, rates: Device, device: torch.device) -> Iterator[Timing]:
    assert case.cost is not None
    tensors = make_tensors(case, TIMED_DTYPE, device)
    forward, backward = (floor_seconds(cost, rates, TIMED_DTYPE) for cost in case.cost(tensors))
    clock, inputs = Clock(device), leaves(tensors)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]

    def without_gradients(_: Any) -> object:
        with torch.no_grad():
            return case.run(tensors)

    yield Timing(case.operator, case.label, "forward", measure(None, without_gradients, device, clock), forward)
    grad = torch.randn_like(case.run(inputs))
    seconds = measure(lambda: case.run(inputs), lambda out: torch.autograd.grad(out, wanted, grad), device, clock)
    yield Timing(case.operator, case.label, "backward", seconds, backward)


def timing_line(timing: Timing) -> str:
    times = (timing.seconds.median, timing.seconds.low, timing.seconds.high, timing.floor)
    columns = " ".join(f"{1e6 * seconds:>8.1f}" for seconds in times)
    return f"{timing.case:<62} {timing.direction:<9} {columns} {timing.floor / timing.seconds.median:>6.0%}"
