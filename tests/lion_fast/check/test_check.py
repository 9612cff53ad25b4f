"""`lion-fast check` finds errors of an operator, and passes a correct one."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lion_fast
import lion_kernels
from lion_fast.check import report
from lion_fast.check.cases import CASES, OPERATORS, TIMED, Case, Tensors
from lion_fast.check.compare import compare, make_tensors, poisoned_memory
from lion_fast.check.timing import Clock, Seconds, captured, measure, measure_rates, quantiles
from lion_fast.check.worker import Task, side_by_side
from lion_fast.cli.check import operators
from lion_kernels.core.cost import H200, Cost, Device, floor_seconds
from tests.operators import OPERATORS as PUBLIC_OPERATORS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RIGHT = lion_kernels.rms_norm
Operator = Callable[..., Tensor]


def smallest(operator: str) -> Case:
    def values(case: Case) -> int:
        return sum(tensor.numel() for tensor in make_tensors(case, torch.float32, torch.device("cpu")).values())

    return min((case for case in CASES if case.operator == operator), key=values)


@pytest.fixture
def _smallest_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "CASES", [smallest(operator) for operator in OPERATORS])
    monkeypatch.setattr(report, "TIMED", [])


def test_every_operator_is_checked_and_timed() -> None:
    assert sorted(OPERATORS) == PUBLIC_OPERATORS == operators()
    assert {case.operator for case in TIMED} == set(OPERATORS)
    assert all(case.cost for case in TIMED)


@pytest.mark.usefixtures("_smallest_cases")
def test_correct_operators_pass(tmp_path: Path, run_cli: Callable) -> None:
    found = tmp_path / "check.json"
    status, out, _ = run_cli("check", dtypes="float32", json=found)
    assert status == 0
    assert ("The kernels run in Triton's interpreter" in out) == (DEVICE.type == "cpu")
    assert f"{len(OPERATORS)} of {len(OPERATORS)} within bounds" in out
    saved = json.loads(found.read_text(encoding="utf-8"))
    assert saved["problems"] == []
    assert saved["environment"]["torch"] == version("torch")  # `torch.__version__` also names the CUDA version
    for outcome in saved["outcomes"]:
        assert outcome["kernels"], outcome
        assert len(outcome["errors"]) >= 4  # the output with and without gradients, and at least two gradients
        assert all(error <= bound <= 1e-5 for error, bound in outcome["errors"].values())


def _slightly_off(*args: Any, **options: Any) -> Tensor:
    return RIGHT(*args, **options) * (1 + 1e-4)


def _gradient_lost(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    return RIGHT(x, weight.detach(), *args, **options) + 0 * weight


def _part_unwritten(*args: Any, **options: Any) -> Tensor:
    out = RIGHT(*args, **options)
    return torch.where(torch.arange(out.shape[-1], device=out.device) < 5, torch.empty_like(out), out)


def _elsewhere(*args: Any, **options: Any) -> Tensor:
    return RIGHT(*args, **{**options, "backend": "torch"})


def _never_the_same() -> Operator:
    calls = iter(range(10**6))
    return lambda *args, **options: RIGHT(*args, **options) * (1 + 1e-6 * next(calls))


def _dies(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("illegal memory access")


@pytest.mark.usefixtures("_smallest_cases")
@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (_slightly_off, "out: error 1.0e-04 above its bound 1.0e-05"),
        (_gradient_lost, "weight: error 1.0e+00 above its bound 1.0e-05"),
        (_part_unwritten, "out: error inf above its bound 1.0e-05"),
        (_elsewhere, "no Triton kernel ran"),
        (_never_the_same(), "out: 2 equal calls gave different bits"),
        (_dies, "RuntimeError: illegal memory access"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_operators_fail_with_the_reason(
    wrong: Operator, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_cli: Callable
) -> None:
    monkeypatch.setattr(lion_kernels, "rms_norm", wrong)
    monkeypatch.setattr(report, "REPEATS", 2)
    found = tmp_path / "check.json"
    status, out, _ = run_cli("check", "--operators", "rms_norm", "gated_gelu", dtypes="float32", json=found)
    assert status == 1
    assert f"FAIL rms_norm, {smallest('rms_norm').label}, float32: {problem}" in out
    assert "FAIL gated_gelu" not in out
    assert "1 of 2 within bounds" in out
    assert any(problem in entry for entry in json.loads(found.read_text(encoding="utf-8"))["problems"])


@pytest.mark.usefixtures("_smallest_cases")
def test_results_before_an_interruption_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_cli: Callable
) -> None:
    def interrupted(*args: Any, **options: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(lion_kernels, "rms_norm", interrupted)
    found = tmp_path / "check.json"
    status, _, _ = run_cli("check", "--operators", "gated_gelu", "rms_norm", dtypes="float32", json=found)
    assert status == 130
    check = json.loads(found.read_text(encoding="utf-8"))
    (outcome,) = check["outcomes"]
    assert outcome["operator"] == "gated_gelu"
    assert check["problems"] == ["1 of 2 comparisons were not made"]


class Rough(Case):
    """A case whose plain formula is half as large again as it should be, except in fp64."""

    def reference(self, tensors: Tensors) -> Tensor:
        out = super().reference(tensors)
        return out if out.dtype == torch.float64 else out * 1.5


@pytest.mark.parametrize(
    ("kind", "factor", "problem"),
    [
        (Case, 1.002, r"out: error [12]\.\de-03 above its bound \d\.\de-04"),
        (Rough, 1.02, r"out: error 2\.\de-02 above its bound 3\.9e-03"),
    ],
)
def test_half_precision_may_have_twice_the_error_of_an_accurate_plain_formula(
    kind: type[Case], factor: float, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A formula that is itself inaccurate does not loosen the bound."""
    case, right = kind(**vars(smallest("gated_gelu"))), lion_kernels.gated_gelu
    assert not compare(case, torch.float16, DEVICE, repeats=1).problems
    monkeypatch.setattr(lion_kernels, "gated_gelu", lambda *args, **options: right(*args, **options) * factor)
    (found, *_) = compare(case, torch.float16, DEVICE, repeats=1).problems
    assert re.fullmatch(problem, found)


def test_small_gradients_are_judged_over_several_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate's gradient that is wrong from the third backward pass on fails; the first comes with the output's own."""
    passes = itertools.count()

    class WrongInTime(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor) -> Tensor:
            return gate.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * (1.1 if next(passes) >= 2 else 1.0)

    right = lion_kernels.mixture_of_adapters
    case = next(case for case in CASES if "dense for all" in case.label and case.operator == "mixture_of_adapters")
    monkeypatch.setattr(
        lion_kernels, "mixture_of_adapters", lambda *, gate, **given: right(gate=WrongInTime.apply(gate), **given)
    )
    (problem,) = compare(case, torch.float32, DEVICE, repeats=1).problems
    assert problem.startswith("gate: error")


def test_every_allocation_is_poisoned() -> None:
    with poisoned_memory():
        for tensor in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(1).new_empty(3)):
            assert tensor.isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels are compiled here")
def test_check_runs_without_installation_and_chooses_the_interpreter_before_triton_is_imported() -> None:
    """PYTHONPATH suffices, as on a machine where nothing can be installed."""
    root = Path(lion_fast.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(root / folder) for folder in (".", "kernels", "reference"))
    command = [sys.executable, "-m", "lion_fast", "check", "--operators", "rms_norm", "--dtypes", "float32"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "in Triton's interpreter" in run.stdout
    assert "5 of 5 within bounds" in run.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--operators", "rms_norm", "layer_norm"],
            "--operators: expected some of assemble_inputs, .*, got layer_norm",
        ),
        (["--device", "meta"], "no device 'meta' here|expected cpu or cuda, got meta"),
        (["--dtypes", "bfloat16", "--device", "cpu"], "--dtypes: bfloat16 needs a GPU"),
        (["--dtypes", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_errors_name_invalid_options(options: list[str], message: str, run_cli: Callable) -> None:
    status, _, err = run_cli("check", *options)
    assert status == 2
    assert re.search(message, err)


def test_quantiles() -> None:
    assert quantiles([float(n) for n in range(11)]) == Seconds(5.0, 2.0, 8.0)


@pytest.mark.parametrize("case", TIMED, ids=lambda case: f"{case.operator}, {case.label}")
def test_every_timed_case_has_a_floor(case: Case) -> None:
    """Tensors without values suffice, so the model's own shapes cost no time."""
    assert case.cost is not None
    with torch.device("meta"):
        made = case.make(None)
    tensors = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in made.items()}
    for cost in case.cost(tensors):
        assert 1e-8 < floor_seconds(cost, H200, torch.bfloat16) < 1e-2


def test_times_are_listed_with_their_floor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of a GPU is tested on any machine, with a clock that gives ten times the floor."""

    def measure(prepare: Callable[[], Any] | None, call: Callable[[Any], Any], *_: Any) -> Seconds:
        call(prepare() if prepare else None)
        return Seconds(1e-5, 9e-6, 2e-5)

    cost = Cost(bytes=1000, flops=10)
    case = replace(smallest("gated_gelu"), cost=lambda _: (cost, cost))
    rates = Device("a GPU", bytes_per_second=1e9, flops_per_second={"float16": 1e12})
    monkeypatch.setattr(report, "TIMED_DTYPE", torch.float16)
    monkeypatch.setattr(report, "Clock", lambda device: None)
    monkeypatch.setattr(report, "measure", measure)
    check = report.Check("compiled", rates=rates)
    report._time(check, [case], DEVICE)
    assert [timing.direction for timing in check.timings] == ["forward", "backward"]
    out = capsys.readouterr().out
    assert "a GPU: copies 0.00 TB/s, multiplies float16 1 TFLOP/s" in out
    assert len(re.findall(r"10\.0 +9\.0 +20\.0 +1\.0 +10%", out)) == 2


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = replace(smallest("rms_norm"), cost=lambda _: (Cost(1, 1), Cost(1, 1)))
    monkeypatch.setattr(lion_kernels, "rms_norm", lambda *args, **options: RIGHT(*args, **options) * 2)
    check = report.Check("compiled", rates=Device("a GPU", 1e9, {"float16": 1e12}))
    report._compare(check, [Task(case, torch.float16, repeats=1)], DEVICE, processes=1)
    assert check.problems
    report._time(check, [case], DEVICE)
    assert check.timings == []
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "not measured: its result is wrong" in out


def test_parallel_cases_have_the_same_outcomes_as_one_process() -> None:
    tasks = [Task(smallest(operator), torch.float32, repeats=2) for operator in ("rms_norm", "gated_gelu")]
    found = {outcome.operator: outcome for outcome in side_by_side(tasks, DEVICE, processes=2)}
    alone = {task.case.operator: compare(task.case, task.dtype, DEVICE, repeats=2) for task in tasks}
    assert found == alone
    assert all(outcome.kernels and not outcome.problems for outcome in found.values())


def test_a_dead_worker_is_an_outcome_and_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After a fault on a GPU, nothing in its process recovers."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        f"first = Path({str(tmp_path / 'first')!r})\n"
        "if 'lion_fast.check.worker' in sys.orig_argv and not first.exists():\n"
        "    first.touch()\n"
        "    os._exit(7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tasks = [Task(smallest(operator), torch.float32, repeats=1) for operator in ("rms_norm", "gated_gelu")]
    outcomes = list(side_by_side(tasks, DEVICE, processes=1))
    assert [outcome.problems for outcome in outcomes] == [["its process ended with 7"], []]


@pytest.mark.gpu
def test_measured_on_a_gpu() -> None:
    rates = measure_rates(DEVICE, (torch.float32, torch.bfloat16))
    assert rates.bytes_per_second > 1e11
    assert rates.flops_per_second["bfloat16"] > 1e12
    seconds = measure(None, lambda _: torch.cuda._sleep(10**6), DEVICE)
    assert 1e-4 < seconds.low <= seconds.median <= seconds.high < 1e-1


@pytest.mark.gpu
def test_synchronising_calls_are_timed_without_a_graph() -> None:
    x = torch.ones(1000, device=DEVICE, requires_grad=True)
    backward = captured(lambda: (x * 2).sum(), lambda out: torch.autograd.grad(out, x), DEVICE)
    assert backward.refused is None
    waits = captured(None, lambda _: x.sum().item(), DEVICE)
    assert waits.refused
    assert torch.cuda.get_sync_debug_mode() == 0
    clock = Clock(DEVICE)
    assert all(0 < clock(call)() < 1e-1 for call in (backward, waits))


@pytest.mark.gpu
def test_a_failed_capture_leaves_no_trace() -> None:
    """Only a capture refuses to synchronise the whole device; PyTorch's mode that finds synchronisation does not."""
    failed = captured(None, lambda _: torch.cuda.synchronize(), DEVICE)
    assert failed.refused
    assert "called a synchronizing" not in failed.refused
    assert torch.cuda.current_stream(DEVICE) == torch.cuda.default_stream(DEVICE)
    assert torch.randn(3, device=DEVICE).isfinite().all()
    again = captured(None, lambda _: torch.ones(10, device=DEVICE) + 1, DEVICE)
    assert again.refused is None
    assert 0 < Clock(DEVICE)(again)() < 1e-1
