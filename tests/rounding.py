"""How far rounding takes results, and the bounds that follow: of the golden model, of operators, and of small models.

No two CPUs round alike: BLAS and torch choose kernels, and with them the order of sums, by the CPU, by its vector
instructions and by the number of threads. So no bound here is what one machine gave. `WORST` is the worst relative
error of many ways to compute the same in fp32 (`docs/exactness.md` lists them), each result against the same
computation in fp64 and against the golden values, which are fp32 results of one CPU more. A test allows `MARGIN` times
that.

The ways share inputs, weights and dtype, so the errors are those of the arithmetic: the aggregator's softmax magnifies
the vision tower's last bits by 60, and AdamW's first steps, which are the signs of gradients, turn a gradient that is
rounding into a whole step. `pytest -v tests/lion_fast/test_golden.py` prints what the machine at hand gives.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MARGIN = 3

# What the kernels promise of one operator in fp32, outputs and gradients, from fp64. The worst that was seen of fixed
# shapes is 1.3e-6, over one thread and two, native, AVX2 and default code paths, and OpenBLAS' for several CPUs, with
# which the interpreter computes.
OPERATOR_FP32 = 1e-5

# Of an operator that reads some of its inputs in fp16, whose rounding is 2**-11: eight of those. 6.4e-4 was seen.
OPERATOR_FP16 = 4e-3

# Logits and gradients of a small model in fp32, computed in two ways that are equal in exact arithmetic (with a cache
# and without, folded and not, alone and in a batch), element by element. A sixteenth of this was seen.
TWO_WAYS = {"rtol": 1e-4, "atol": 1e-5}

# Its loss likewise, a mean over tokens whose rounding averages out: 2.4e-7 was seen.
LOSS_TWO_WAYS = 1e-5

# Of the golden values, from fp64: fixed files, the same on every machine up to fp64's own rounding.
GOLDEN_DISTANCE = {
    "vision": 4.89e-7,
    "aggregator": 3.02e-5,
    "projected": 1.18e-5,
    "prefix": 2.19e-6,
    "encoder": 1.36e-5,
    "logits": 1.60e-5,
    "loss": 2.34e-7,
}

WORST = {
    "vision": 4.9e-7,
    "aggregator": 3.1e-5,
    "projected": 1.2e-5,
    "prefix": 2.2e-6,
    "encoder": 1.5e-5,
    "logits": 1.7e-5,
    "logits of one sample": 2.8e-5,
    "loss": 6.5e-7,
    "gradients": 3.6e-4,
}

# Of the loss, by steps of the golden training run. A difference grows by 100 a step until the curves are those of
# different runs of the same training: the worst up to each step, since what has grown comes back by chance only.
WORST_LOSS = (3.4e-7, 3.5e-5, 6.2e-4, 4.0e-3, 4.0e-3, 1.4e-2, *(1.6e-2,) * 6)

nearest: dict[str, tuple[float, float]] = {}
"""By what was compared: the error that came nearest its bound in this process, and that bound."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in fp64, wherever the two are; infinite where anything is NaN."""
    assert got.shape == expected.shape
    got, expected = (value.detach().double().cpu() for value in (got, expected))
    error = ((got - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
    return float("inf") if math.isnan(error) else error


def between(values: Tensor) -> Tensor:
    """A threshold for `values` [N, ...], along the first dimension: amid the widest gap of two neighbours.

    Rounding decides on which side of one of the values another computation of it is, and of their median.
    """
    ordered = values.sort(0).values
    gaps = ordered.diff(dim=0)
    widest = gaps.argmax(0, keepdim=True)
    return (ordered.gather(0, widest) + gaps.gather(0, widest) / 2).squeeze(0)


def rounding_bound(plain: Tensor, exact: Tensor) -> float:
    """What a kernel's result may be from `exact`, by what the plain formula's in the same dtype is.

    Both round as often, so twice as much is allowed, and the rounding of the result itself, as a gradient of few
    elements may be lucky in one form, and exact. 0.57 of it was seen.
    """
    return 2 * relative_error(plain, exact) + torch.finfo(plain.dtype).eps / 2


def expect_within(name: str, error: float, worst: float | None = None) -> None:
    """Hold `error` to `MARGIN` times `worst`, by default `WORST[name]`."""
    bound = MARGIN * (WORST[name] if worst is None else worst)
    nearest[name] = max(nearest.get(name, (0.0, bound)), (error, bound))
    assert error < bound, f"{name}: {error:.2e}, expected less than {bound:.2e}"


def expect_golden_curve(losses: Sequence[float], golden: Sequence[float]) -> None:
    """Hold each step's loss to the golden one, as far as rounding lets it."""
    assert len(losses) == len(golden) == len(WORST_LOSS)
    for step, (loss, expected, worst) in enumerate(zip(losses, golden, WORST_LOSS, strict=True), 1):
        expect_within(f"loss of step {step:2}", abs(loss - expected) / expected, worst)
