"""One case in one dtype: the kernels' output and gradients against the fp64 reference, and against themselves."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lion_fast.check.cases import Case, Tensors
from lion_kernels.core.operator import all_kernels

FP32_BOUND = 1e-5
# In eps of a half-precision dtype, the most that is allowed whatever the plain formula is off, which rounds before its
# ReLU: by ten of them. A right result is 0.7 off at the most.
HALF_PRECISION_CAP = 4.0
# What has fewer elements is judged over several gradients of the output: of one, luck decides how large it is, how far
# off, and how far off the plain formula.
FEW_ELEMENTS = 32
GRADIENTS = 8
INFERENCE = "out without gradients"


@dataclass
class Outcome:
    """What a case came to.

    Attributes:
        errors: by tensor ("out", or the argument whose gradient it is), `||got - exact|| / ||exact||` and its bound.
        kernels: how often each Triton kernel was launched in a forward and backward and a forward without gradients.
        problems: what is wrong, a sentence each; empty where all is well.
    """

    operator: str
    case: str
    dtype: str
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def compare(case: Case, dtype: torch.dtype, device: torch.device, *, repeats: int) -> Outcome:
    """Runs `case` on the kernels with poisoned memory, holds every tensor that comes out to its bound, and repeats it.

    The reference computes in fp64 from the inputs as `dtype` holds them: on the CPU, and for cases that measure time,
    which are too large for it, on `device`. The bound is 1e-5 in fp32; in half precision twice the error of the
    reference computed in that dtype on `device`, but no less than the rounding of the result itself, and no more than
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
        # On a GPU not in deterministic mode, which would hide what else of torch's an operator uses.
        first = got if device.type == "cpu" else _kernel_results(case, tensors, draw)
        others = (_kernel_results(case, tensors, draw) for _ in range(repeats - 1))
        differing = {name for other in others for name in first if not torch.equal(first[name], other[name])}
    except Exception as error:  # whatever a kernel dies of is a finding, and the other cases still count
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
    """The gradient of an output: random values that every dtype holds, the same for every dtype, drawn once.

    Args:
        device: where they are drawn, which a model's own shapes would take long for on a CPU.
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
    """As in training, and the output as it is computed where nothing asks for a gradient."""
    results = results_of(case.run, leaves(tensors), draw)
    with torch.no_grad():
        return {**results, INFERENCE: case.run(tensors)}


def make_tensors(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    """The same values for every dtype, as far as it holds them; the model's own shapes are drawn on `device`."""
    drawn_on = device if case.cost else torch.device("cpu")
    tensors = case.make(torch.Generator(drawn_on).manual_seed(0))
    return {name: value.to(device, _kind(value, dtype)) for name, value in tensors.items()}


def _kind(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def leaves(tensors: Tensors, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensors:
    """`tensors`, the floating ones asking for gradients, and in `dtype`."""
    return {
        name: value.detach().to(device, _kind(value, dtype or value.dtype)).requires_grad_(value.is_floating_point())
        for name, value in tensors.items()
    }


def results_of(operator: Callable[[Tensors], Tensor], tensors: Tensors, draw: Draw | None = None) -> Tensors:
    """The output, and the gradient of every leaf for the random gradient of the output that `draw` gives."""
    draw = draw or Draw(torch.device("cpu"))
    out = operator(tensors)
    wanted = [name for name, value in tensors.items() if value.requires_grad]
    gradients = torch.autograd.grad(out, [tensors[name] for name in wanted], draw(out))
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def _gradients_over(
    draws: list[Draw], operator: Callable[[Tensors], Tensor], tensors: Tensors, names: list[str]
) -> Tensors:
    """Those of `names` for each gradient of the output, stacked."""
    if not names:
        return {}
    out = operator(tensors)
    # All are asked for, as otherwise: for some alone other kernels would run.
    wanted = [name for name, value in tensors.items() if value.requires_grad]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for draw in draws:
        gradients = torch.autograd.grad(out, [tensors[name] for name in wanted], draw(out), retain_graph=True)
        for name in names:
            found[name].append(gradients[wanted.index(name)])
    return {name: torch.stack(values) for name, values in found.items()}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """`||got - exact|| / ||exact||` in fp64; infinite where anything is NaN or the shapes differ."""
    if got.shape != exact.shape:
        return float("inf")
    got = got.to(exact.device, torch.float64)
    error = ((got - exact).norm() / exact.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is handed out uninitialised holds NaN (integers: the largest), so that what nobody writes shows.

    torch fills it itself in its deterministic mode, in which some of its operators choose other algorithms.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of operators that have no deterministic algorithm
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """How often each kernel of lion_kernels is launched within, compiled or interpreted."""
    counter: Counter[str] = Counter()
    hooks = []
    for kernel in all_kernels():
        hook = functools.partial(_count, counter, kernel.__name__)
        kernel.add_pre_run_hook(hook)
        hooks.append((kernel, hook))
    try:
        yield counter
    finally:
        for kernel, hook in hooks:
            kernel.pre_run_hooks.remove(hook)


def _count(counter: Counter[str], kernel: str, /, *args: object, **kwargs: object) -> None:
    counter[kernel] += 1
