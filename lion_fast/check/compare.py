"""One case in one dtype: output and gradients of the kernels against the fp64 reference, and against repeated runs."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lion_fast.check.cases import Case, Tensors
from lion_kernels.core.operator import all_kernels

FP32_BOUND = 1e-5
# Upper limit of the bound, in eps of a half-precision dtype. The plain formula rounds before its ReLU and can be off by
# ten of them; the error of a correct result is at most 0.7.
HALF_PRECISION_CAP = 4.0
# Gradients with fewer elements are judged over several gradients of the output: for a single one, their size and the
# errors of both the kernels and the plain formula are a matter of chance.
FEW_ELEMENTS = 32
GRADIENTS = 8
INFERENCE = "out without gradients"


@dataclass
class Outcome:
    """The result of one case.

    Attributes:
        errors: per tensor ("out", or the argument of a gradient), `||got - exact|| / ||exact||` and its bound.
        kernels: launches per Triton kernel in a forward and backward and a forward without gradients.
        problems: one sentence per problem; empty if there are none.
    """

    operator: str
    case: str
    dtype: str
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def compare(case: Case, dtype: torch.dtype, device: torch.device, *, repeats: int) -> Outcome:
    """Run `case` on the kernels with poisoned memory, check every result against its bound, and repeat the run.

    The reference computes in fp64 from the inputs as rounded to `dtype`. It runs on the CPU, except that timed cases,
    which are too large for it, run on `device`. The bound is 1e-5 in fp32. In half precision it is twice the error of
    the reference in that dtype on `device`, at least the rounding of the result itself, and at most
    `HALF_PRECISION_CAP`.
    """
    outcome = Outcome(case.operator, case.label, name_of(dtype))
    tensors = make_tensors(case, dtype, device)
    oracle = device if case.cost else torch.device("cpu")
    draw = Draw(oracle)
    exact = results_of(case.reference, leaves(tensors, torch.float64, oracle), draw)
    plain = results_of(case.reference, leaves(tensors), draw) if dtype.itemsize < 4 else None
    few = [name for name, value in exact.items() if name != "out" and value.numel() < FEW_ELEMENTS]
    draws = [Draw(oracle, seed) for seed in range(2, 2 + GRADIENTS)]
    exact |= _gradients_over(draws, case.reference, leaves(tensors, torch.float64, oracle), few)
    if plain is not None:
        plain |= _gradients_over(draws, case.reference, leaves(tensors), few)
    try:
        with poisoned_memory(), counted_launches() as launches:
            got = _kernel_results(case, tensors, draw)
        judged = got | _gradients_over(draws, case.run, leaves(tensors), few)
        # On a GPU outside deterministic mode, which would hide torch operators that an operator uses.
        first = got if device.type == "cpu" else _kernel_results(case, tensors, draw)
        others = (_kernel_results(case, tensors, draw) for _ in range(repeats - 1))
        differing = {name for other in others for name in first if not torch.equal(first[name], other[name])}
    except Exception as error:  # any exception is a finding, and the other cases still count
        outcome.problems.append(f"{type(error).__name__}: {error}")
        return outcome
    outcome.kernels = dict(launches)
    if not outcome.kernels:
        outcome.problems.append("no Triton kernel ran")
    for name, value in judged.items():
        like = "out" if name == INFERENCE else name
        error, bound = relative_error(value, exact[like]), FP32_BOUND
        if plain is not None:
            eps = torch.finfo(dtype).eps
            bound = min(max(2 * relative_error(plain[like], exact[like]), eps / 2), HALF_PRECISION_CAP * eps)
        outcome.errors[name] = error, bound
        if value.dtype != dtype:
            outcome.problems.append(f"{name}: expected {name_of(dtype)}, got {name_of(value.dtype)}")
        if not error <= bound:
            outcome.problems.append(f"{name}: error {error:.1e} above its bound {bound:.1e}")
    outcome.problems += [f"{name}: {repeats} equal calls gave different bits" for name in sorted(differing)]
    return outcome


class Draw:
    """The gradient of an output: random values that are exact in every dtype, the same for all dtypes, drawn once.

    Args:
        device: where they are drawn; the model's own shapes would take long on a CPU.
        seed: of the generator.
    """

    def __init__(self, device: torch.device, seed: int = 1) -> None:
        self.device, self.seed = device, seed
        self._drawn: dict[torch.Size, Tensor] = {}

    def __call__(self, out: Tensor) -> Tensor:
        if out.shape not in self._drawn:
            generator = torch.Generator(self.device).manual_seed(self.seed)
            values = torch.randn(out.shape, generator=generator, device=self.device)
            self._drawn[out.shape] = values.half().bfloat16()
        return self._drawn[out.shape].to(out)


def _kernel_results(case: Case, tensors: Tensors, draw: Draw) -> Tensors:
    """Return the results as in training, and the output as computed without gradients."""
    results = results_of(case.run, leaves(tensors), draw)
    with torch.no_grad():
        return {**results, INFERENCE: case.run(tensors)}


def make_tensors(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Return the case's tensors, equal in every dtype up to rounding; the model's own shapes are drawn on `device`."""
    drawn_on = device if case.cost else torch.device("cpu")
    tensors = case.make(torch.Generator(drawn_on).manual_seed(0))
    return {name: value.to(device, _kind(value, dtype)) for name, value in tensors.items()}


def _kind(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def leaves(tensors: Tensors, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensors:
    """Return `tensors`, with floating ones requiring gradients and in `dtype`."""
    return {
        name: value.detach().to(device, _kind(value, dtype or value.dtype)).requires_grad_(value.is_floating_point())
        for name, value in tensors.items()
    }


def results_of(operator: Callable[[Tensors], Tensor], tensors: Tensors, draw: Draw | None = None) -> Tensors:
    """Return the output, and every leaf's gradient for the output gradient that `draw` gives."""
    draw = draw or Draw(torch.device("cpu"))
    out = operator(tensors)
    wanted = [name for name, value in tensors.items() if value.requires_grad]
    gradients = torch.autograd.grad(out, [tensors[name] for name in wanted], draw(out))
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def _gradients_over(
    draws: list[Draw], operator: Callable[[Tensors], Tensor], tensors: Tensors, names: list[str]
) -> Tensors:
    """Return the gradients of `names` for each gradient of the output, stacked."""
    if not names:
        return {}
    out = operator(tensors)
    # All gradients are requested, as above: for a subset, other kernels would run.
    wanted = [name for name, value in tensors.items() if value.requires_grad]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for draw in draws:
        gradients = torch.autograd.grad(out, [tensors[name] for name in wanted], draw(out), retain_graph=True)
        for name in names:
            found[name].append(gradients[wanted.index(name)])
    return {name: torch.stack(values) for name, values in found.items()}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return `||got - exact|| / ||exact||` in fp64; infinite for NaNs or different shapes."""
    if got.shape != exact.shape:
        return float("inf")
    got = got.to(exact.device, torch.float64)
    error = ((got - exact).norm() / exact.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN (integers: the maximum) within the context, to expose unwritten values.

    torch does so itself in its deterministic mode, in which some of its operators choose other algorithms.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # for operators without a deterministic algorithm
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count the launches of each kernel of lion_kernels within the context, compiled or interpreted."""
    counter: Counter[str] = Counter()
    with ExitStack() as stack:
        for kernel in all_kernels():
            hook = functools.partial(_count, counter, kernel.__name__)
            kernel.add_pre_run_hook(hook)
            stack.callback(kernel.pre_run_hooks.remove, hook)
        yield counter


def _count(counter: Counter[str], kernel: str, /, *args: object, **kwargs: object) -> None:
    counter[kernel] += 1
