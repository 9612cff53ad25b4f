"""All cases in all dtypes: the tables that `lion-fast check` prints, and what of them goes to JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from lion_fast.check.cases import CASES, TIMED, Case
from lion_fast.check.compare import Outcome, compare, leaves, make_tensors, name_of
from lion_fast.check.environment import environment
from lion_fast.check.timing import Seconds, measure, measure_rates
from lion_kernels.backend import interpreting
from lion_kernels.cost import Device, floor_seconds

TIMED_DTYPE = torch.bfloat16
REPEATS_INTERPRETED = 2  # a call costs about a second there
REPEATS = 200


@dataclass(frozen=True)
class Timing:
    """A case's time in one direction beside its floor, in seconds."""

    operator: str
    case: str
    direction: str
    seconds: Seconds
    floor: float


@dataclass
class Check:
    """All that was found; `problems` is empty where every operator is within its bounds."""

    backend: str
    outcomes: list[Outcome] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    rates: Device | None = None

    @property
    def problems(self) -> list[str]:
        return [f"{o.operator}, {o.case}, {o.dtype}: {problem}" for o in self.outcomes for problem in o.problems]

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": environment(),
            "backend": self.backend,
            "problems": self.problems,
            "outcomes": [_finite(asdict(outcome)) for outcome in self.outcomes],
            "rates": self.rates and asdict(self.rates),
            "timings": [asdict(timing) for timing in self.timings],
        }


def _finite(outcome: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    errors = {name: [error if isfinite(error) else None, bound] for name, (error, bound) in outcome["errors"].items()}
    return {**outcome, "errors": errors}


def run_check(
    operators: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device, json_file: Path | None = None
) -> Check:
    """Holds `operators` to the reference in `dtypes` on `device`, and prints the tables as they come.

    On a CUDA device it also measures the time of the model's own shapes. Elsewhere the kernels are interpreted.
    `json_file` gets everything, and where the check is interrupted what it had found.
    """
    check = Check("interpreter" if interpreting() else "compiled")
    try:
        _compare(check, operators, dtypes, device)
        if device.type == "cuda" and TIMED_DTYPE in dtypes:
            check.rates = measure_rates(device, tuple(dtypes))
            _time(check, operators, device)
    finally:
        if json_file is not None:
            json_file.write_text(json.dumps(check.to_json(), indent=1), encoding="utf-8")
    for problem in check.problems:
        print(f"FAIL {problem}")
    wrong = sum(bool(outcome.problems) for outcome in check.outcomes)
    print(f"{len(check.outcomes) - wrong} of {len(check.outcomes)} within bounds")
    return check


def _compare(check: Check, operators: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    print(f"{'':<64} {'dtype':<8} {'error':>8} {'bound':>8}  {'nearest its bound':<21} {'launches':>8}")
    repeats = REPEATS_INTERPRETED if interpreting() else REPEATS
    for operator in operators:
        print(operator)
        for case in (case for case in CASES if case.operator == operator):
            for dtype in dtypes:
                check.outcomes.append(compare(case, dtype, device, repeats=repeats))
                print(f"  {line(check.outcomes[-1])}", flush=True)


def line(outcome: Outcome) -> str:
    """The tensor nearest its bound, or furthest beyond it, and how many kernels the call launched."""
    said = f"{outcome.case:<62} {outcome.dtype:<8}"
    if outcome.errors:
        tensor, (error, bound) = max(outcome.errors.items(), key=lambda entry: entry[1][0] / entry[1][1])
        said += f" {error:>8.1e} {bound:>8.1e}  {tensor:<21} {sum(outcome.kernels.values()):>8}"
    return f"{said}  FAIL" if outcome.problems else said


def _time(check: Check, operators: Sequence[str], device: torch.device) -> None:
    rates = check.rates
    assert rates is not None
    reached = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.flops_per_second.items())
    print(f"\n{rates.name}: copies {rates.bytes_per_second / 1e12:.2f} TB/s, multiplies {reached}")
    print(f"{'':<64} {'':<9} {'us':>8} {'20 %':>8} {'80 %':>8} {'floor':>8} {'reached':>7}")
    for operator in operators:
        print(f"{operator}, {name_of(TIMED_DTYPE)}")
        for case in (case for case in TIMED if case.operator == operator):
            try:
                check.outcomes.append(compare(case, TIMED_DTYPE, device, repeats=2))
                if check.outcomes[-1].problems:  # a wrong result has no time
                    print(f"  {line(check.outcomes[-1])}", flush=True)
                    continue
                for timing in _timings(case, rates, device):
                    check.timings.append(timing)
                    print(f"  {timing_line(timing)}", flush=True)
            except torch.OutOfMemoryError:
                print(f"  {case.label:<62} not measured: it does not fit this GPU's memory")


def _timings(case: Case, rates: Device, device: torch.device) -> Iterator[Timing]:
    assert case.cost is not None
    tensors = make_tensors(case, TIMED_DTYPE, device)
    forward, backward = (floor_seconds(cost, rates, TIMED_DTYPE) for cost in case.cost(tensors))
    with torch.no_grad():
        seconds = measure(lambda: case.run(tensors), device)
    yield Timing(case.operator, case.label, "forward", seconds, forward)
    inputs = leaves(tensors)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    out = case.run(inputs)
    grad = torch.randn_like(out)
    seconds = measure(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True), device)
    yield Timing(case.operator, case.label, "backward", seconds, backward)


def timing_line(timing: Timing) -> str:
    times = (timing.seconds.median, timing.seconds.low, timing.seconds.high, timing.floor)
    columns = " ".join(f"{1e6 * seconds:>8.1f}" for seconds in times)
    return f"{timing.case:<62} {timing.direction:<9} {columns} {timing.floor / timing.seconds.median:>6.0%}"
