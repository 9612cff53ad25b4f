"""The common part of the benchmarks: peers take turns on the same inputs, and only correct results are timed.

Peers run on a GPU in bf16 with the kernels, on a CPU in fp32 without. Each time comes with its ratio to a baseline,
turn by turn, the lower bound on this device (by its own measured rates), and its memory.
"""

import functools
import gc
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.memory import peak_bytes, saved_bytes
from benchmarks.harness.results import OURS
from lion_fast.check.compare import Draw, name_of, relative_error, results_of
from lion_fast.check.timing import Clock, as_it_is, captured, measure_rates, quantiles
from lion_kernels.core.cost import Cost, Device, floor_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FP32_BOUND = 1e-5
FLEX_FORWARD = frozenset() if DEVICE.type == "cuda" else frozenset({"FlexAttention"})  # no backward on a CPU
SECONDS = float(os.environ.get("LION_BENCH_SECONDS", "0.25"))  # for the turns of one comparison, on a CPU
MIN_ROUNDS, MAX_ROUNDS = 5, 50
# Tests only compile, in parallel (pytest -n): with empty caches, compilation takes the most time.
COMPILE_ONLY = os.environ.get("LION_BENCH_COMPILE_ONLY", "0") == "1"
Inputs = dict[str, Tensor]
Shape = Mapping[str, Any]
Operator = Callable[..., Tensor]
Turn = tuple[
    Callable[[], Any] | None, Callable[[Any], Any]
]  # preparation, and the timed call, which receives its result


@dataclass(frozen=True)
class Suite:
    """An operator's peers at one shape.

    Attributes:
        name: of the operator; it groups the results.
        operators: by name; each is called with the inputs as keyword arguments. Times are divided by those of "eager".
        plain: the same mathematics in plain PyTorch. In half precision, our error may be twice as large, a peer's four
            times.
        reference: likewise, for fp64.
        make_inputs: returns the inputs; those to be trained require a gradient.
        costs: of forward and backward in the measured dtype.
        forward_only: those of `operators` without backward on this device.
        timed: by name, the function to time instead of the one of `operators` that is compared with the reference; used
            for dropout, whose masks differ between peers.
    """

    name: str
    operators: Mapping[str, Operator]
    plain: Operator
    reference: Operator
    make_inputs: Callable[[], Inputs]
    costs: Sequence[Cost]
    forward_only: frozenset[str] = frozenset()
    timed: Mapping[str, Operator] = field(default_factory=dict)


@dataclass
class Comparison:
    """All peers of one suite on the same inputs.

    Attributes:
        problems: why a peer has no time: it is wrong (an AssertionError), or it does not run here.
        errors: by peer, the relative error of the output or gradient nearest its bound, and that bound.
        not_graphs: on a GPU, by peer, why its times are of calls instead of CUDA graphs.
    """

    suite: Suite
    inputs: Inputs
    problems: dict[str, Exception] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    not_graphs: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Fill `problems`, `errors` and `memory`, with the gradients of every input that requires one."""
        double = {name: _like_leaf(value, torch.float64) for name, value in self.inputs.items()}
        exact = results(self.suite.reference, double)
        bounds = dict.fromkeys(exact, FP32_BOUND)
        if DTYPE.itemsize < 4:
            rounding = torch.finfo(DTYPE).eps / 2
            for name, value in results(self.suite.plain, self.inputs).items():
                bounds[name] = max(rounding, 2 * relative_error(value, exact[name]))
        # Peers may round differently: "products" adds gradients of tasks in half precision.
        of_peers = {name: 2 * bound for name, bound in bounds.items()}
        for peer, operator in self.suite.operators.items():
            allowed = bounds if peer.startswith(OURS) else of_peers
            try:
                if peer in self.suite.forward_only:
                    out = turn(operator, self.inputs, "forward")[1](None)
                    self.errors[peer] = _worst({"out": out}, exact, allowed)
                    continue
                self.errors[peer] = _worst(results(operator, self.inputs), exact, allowed)
                _, both = turn(operator, self.inputs, "forward+backward")
                peak = peak_bytes(functools.partial(both, None), DEVICE)
                self.memory[peer] = peak, saved_bytes(operator, self.inputs)
            except Exception as error:
                # Its frames hold allocations, and an autograd graph that a later capture would wait for.
                error.__context__ = error.__cause__ = None
                self.problems[peer] = error.with_traceback(None)

    def seconds(self, direction: str) -> dict[str, list[float]]:
        """Return each correct peer's time in every round; the times of a round are taken in succession."""
        if direction not in self.times:
            unable = self.suite.forward_only if direction != "forward" else ()
            right = {peer: op for peer, op in self.suite.operators.items() if peer not in {*self.problems, *unable}}
            timed = self.suite.timed
            calls = {peer: turn(timed.get(peer, op), self.inputs, direction) for peer, op in right.items()}
            self.times[direction] = interleave(calls, graphs=True, refused=self.not_graphs)
        return self.times[direction]

    def floor(self, direction: str) -> float:
        forward, backward = (floor_seconds(cost, rates(), DTYPE) for cost in self.suite.costs)
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]


def turn(operator: Operator, inputs: Inputs, direction: str) -> Turn:
    """Return the call of one direction; forward alone keeps nothing for backward."""
    wanted = [value for value in inputs.values() if value.requires_grad]
    detached = {name: value.detach() for name, value in inputs.items()}

    def forward() -> Tensor:
        return operator(**inputs)

    def without_gradients(_: None) -> Tensor:
        with torch.no_grad():
            return operator(**detached)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, wanted, _gradient(out.shape, out.dtype))

    if direction == "forward":
        return None, without_gradients
    return (forward, backward) if direction == "backward" else (None, lambda _: backward(forward()))


@functools.cache
def _gradient(size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an output's gradient, drawn by the first call, which is not timed."""
    return draw(*size, generator=seeded(1)).to(dtype)


def measure(benchmark: Any, suite: Suite, peer: str, direction: str, shape: Shape) -> None:
    """Report the time of one peer if its result is correct. The first call times all peers, in turns.

    The calling test has the marker `INTERLEAVED`, with which pytest-benchmark's clock returns the times taken here.

    Args:
        shape: sizes that distinguish this comparison from others of the suite's name, for tables and curves.
    """
    skip_after_deadline()
    if COMPILE_ONLY:
        _compile(suite, peer, suite.make_inputs())
    comparison = _comparison(suite, tuple(shape.items()))
    if peer in comparison.problems:
        problem = comparison.problems[peer]
        if peer == "eager" or peer.startswith(OURS):
            raise problem
        pytest.skip(f"{peer} has no time here: {str(problem) or type(problem).__name__}")
    if peer in suite.forward_only and direction != "forward":
        pytest.skip(f"{peer} has no backward on this device")
    seconds = comparison.seconds(direction)
    error, bound = comparison.errors[peer]
    peak, saved = comparison.memory.get(peer, (None, None))
    report(
        benchmark,
        seconds,
        peer,
        baseline="eager",
        group=f"{suite.name}, {', '.join(f'{key} {value}' for key, value in shape.items())}, {direction}",
        suite=suite.name,
        direction=direction,
        shape=dict(shape),
        floor_seconds=comparison.floor(direction),
        peak_bytes=peak,
        saved_bytes=saved,
        error=error,
        bound=bound,
        **({"not_a_graph": comparison.not_graphs[peer]} if peer in comparison.not_graphs else {}),
    )


def _compile(suite: Suite, peer: str, inputs: Inputs) -> None:
    """Fill the caches of compilers on disk, without reporting failures, which the measurement reports."""
    torch.compiler.reset()  # as before each comparison, to avoid dynamic shapes after another shape
    operators = [suite.operators[peer], *([suite.timed[peer]] if peer in suite.timed else [])]
    try:
        for operator in operators:
            if peer not in suite.forward_only:
                results(operator, inputs)
            with torch.no_grad():
                operator(**{name: value.detach() for name, value in inputs.items()})
    except Exception as problem:
        pytest.skip(f"does not run here: {problem}")
    pytest.skip("compiled, and not measured: LION_BENCH_COMPILE_ONLY is set")


_last: list[tuple[Any, Comparison]] = []


def _comparison(suite: Suite, key: tuple) -> Comparison:
    if not _last or _last[0][0] != (suite.name, key):
        _last.clear()  # to free the inputs' memory
        _gradient.cache_clear()
        gc.collect()
        torch.compiler.reset()  # static shapes for every compiled peer, and no recompilation limit
        comparison = Comparison(suite, suite.make_inputs())
        comparison.check()
        _last.append(((suite.name, key), comparison))
    return _last[0][1]


def interleave(
    calls: Mapping[str, Turn],
    seconds: float | None = None,
    *,
    graphs: bool = False,
    refused: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Return the times of each call by rounds, in which all calls take turns, in alternating order.

    Times are a GPU's events, with a cold cache, or else the clock (a single thread's CPU time), with caches as they
    are.

    Args:
        calls: by name, the preparation (or None), which is not timed, and the timed call, which receives its result.
        seconds: approximate duration, with at least five rounds; None is `SECONDS` on a CPU, and the maximum number of
            rounds on a GPU.
        graphs: on a GPU, time CUDA graphs of the calls that can be captured.
        refused: receives, by name, why the others are timed as calls.
    """
    if not calls:
        return {}
    once = 1.0
    for _ in range(3 if DEVICE.type == "cuda" else 1):
        start = time.perf_counter()
        for prepare, call in calls.values():
            call(prepare() if prepare else None)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        once = time.perf_counter() - start
    if seconds is None:
        seconds = math.inf if DEVICE.type == "cuda" else SECONDS
    rounds = math.ceil(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / once)))
    clocks = _on_gpu(calls, graphs, refused) if DEVICE.type == "cuda" else _by_clock(calls)
    taken: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(clocks[name]())
    return {name: [read() for read in reads] for name, reads in taken.items()}


def alternate(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Return the times of calls without preparation, as `interleave` does."""
    return interleave({name: (None, lambda _, call=call: call()) for name, call in calls.items()}, seconds)


def _by_clock(calls: Mapping[str, Turn]) -> dict[str, Callable[[], Callable[[], float]]]:
    """Time a single thread by its CPU time, which excludes other processes, and several by wall time."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def take(prepare: Callable[[], Any] | None, call: Callable[[Any], Any]) -> Callable[[], float]:
        given = prepare() if prepare else None
        start = now()
        call(given)
        seconds = now() - start
        return lambda: seconds

    return {name: functools.partial(take, *turn) for name, turn in calls.items()}


def _on_gpu(
    calls: Mapping[str, Turn], graphs: bool, refused: dict[str, str] | None
) -> dict[str, Callable[[], Callable[[], float]]]:
    clock, taken = Clock(DEVICE), {}
    for name, (prepare, call) in calls.items():
        made = captured(prepare, call, DEVICE) if graphs else as_it_is(prepare, call, "not asked to be a graph")
        if graphs and made.refused and refused is not None:
            refused[name] = made.refused
        taken[name] = functools.partial(clock, made)
    return taken


_ticks: deque[float] = deque()


def clock() -> float:
    """Return the next of the times taken before, as pytest-benchmark's timer."""
    return _ticks.popleft()


INTERLEAVED = pytest.mark.benchmark(timer=clock)


def report(
    benchmark: Any, seconds: Mapping[str, list[float]], peer: str, *, baseline: str, group: str, **info: Any
) -> None:
    """Pass one peer's times to pytest-benchmark, with `info` and its ratio to `baseline`, round by round."""
    benchmark.group = group
    benchmark.extra_info.update(peer=peer, dtype=name_of(DTYPE), **info)
    if baseline in seconds:
        pairs = zip(seconds[peer], seconds[baseline], strict=True)
        ratio = quantiles([mine / other for mine, other in pairs])
        benchmark.extra_info.update(baseline=baseline, ratio=[ratio.median, ratio.low, ratio.high])
    replay(benchmark, seconds[peer])


def replay(benchmark: Any, seconds: Sequence[float]) -> None:
    """Pass times taken before to pytest-benchmark, whose timer is `clock`."""
    _ticks.clear()
    _ticks.extend(itertools.chain.from_iterable((0.0, value) for value in seconds))
    benchmark.pedantic(lambda: None, rounds=len(seconds))


def skip_after_deadline() -> None:
    """Skip a benchmark that would start after `LION_BENCH_DEADLINE`, in seconds of `time.time()`."""
    deadline = os.environ.get("LION_BENCH_DEADLINE")
    if deadline is not None and time.time() > float(deadline):
        pytest.skip("the time that was given to this run is over")


@functools.cache
def rates() -> Device:
    """Measure this device's bytes copied and operations of matrix products per second."""
    if DEVICE.type == "cuda":
        return measure_rates(DEVICE, (DTYPE,))
    source, target = torch.ones(2**28, dtype=torch.int8), torch.ones(2**28, dtype=torch.int8)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    taken = alternate({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b)}, 0.5)
    copy, product = (quantiles(taken[name]).median for name in ("copy", "product"))
    return Device("cpu", 2 * source.nbytes / copy, {"float32": 2 * 2048**3 / product})


def results(operator: Operator, inputs: Inputs) -> Inputs:
    """Return the output, and the gradients by input, for an output gradient that is exact in every dtype."""
    return results_of(lambda given: operator(**given), inputs, Draw(DEVICE))


def _worst(got: Inputs, exact: Inputs, bounds: Mapping[str, float]) -> tuple[float, float]:
    errors = {name: relative_error(value, exact[name]) for name, value in got.items()}
    for name, error in errors.items():
        if not error <= bounds[name]:
            raise AssertionError(f"wrong {name} (relative error {error:.1e}, allowed {bounds[name]:.1e}), so no time")
    worst = max(errors, key=lambda name: errors[name] / bounds[name])
    return errors[worst], bounds[worst]


def _like_leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).requires_grad_(value.requires_grad) if value.is_floating_point() else value


def draw(*size: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draw normal values on the device by a generator (`seeded`); drawing on a CPU would take long."""
    return torch.randn(*size, generator=generator, device=DEVICE) * scale


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def leaf(value: Tensor) -> Tensor:
    """Return `value` on the device, in the measured dtype, requiring its gradient."""
    return value.to(DEVICE, DTYPE).requires_grad_()
