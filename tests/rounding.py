"""How large rounding errors are, and the tests' bounds derived from them: golden model, operators, small models.

CPUs round differently: BLAS and torch choose kernels, and with them the order of sums, by the CPU, its vector
instructions and the number of threads. So no bound is the result of a single machine. `WORST` holds the largest
relative error of many fp32 code paths (listed in `docs/exactness.md`). Each path is compared with the same computation
in fp64 and with the golden values, which are fp32 results of another CPU. Tests allow `MARGIN` times `WORST`.

The paths share inputs, weights and dtype, so the errors come from the arithmetic: the aggregator's softmax amplifies
the vision tower's last bits by 60, and AdamW's first steps, which are the signs of the gradients, turn a gradient that
is only a rounding error into a full step. `pytest -v tests/lion_fast/test_golden.py` prints this machine's errors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# For the golden values in LION_GOLDEN_DIR; tests/golden/comparison.py has the margin for those in tests/golden.
MARGIN = 3

# For one operator in fp32, outputs and gradients, against fp64. The largest error seen at fixed shapes is 1.3e-6, over
# one and two threads, the native, AVX2 and default code paths, and those of OpenBLAS, which the interpreter uses, for
# several CPUs.
OPERATOR_FP32 = 1e-5

# For an operator with some inputs in fp16: eight roundings of 2**-11. The largest error seen is 6.4e-4.
OPERATOR_FP16 = 4e-3

# For logits and gradients of a small fp32 model, element by element, in two computations that are equal in exact
# arithmetic (with and without a cache, folded or not, alone or in a batch). The largest difference seen is 1/16 of it.
TWO_WAYS = {"rtol": 1e-4, "atol": 1e-5}

# For the loss of such a model, a mean over tokens that averages rounding out. The largest difference seen is 2.4e-7.
LOSS_TWO_WAYS = 1e-5

# Results computed from the golden vision tower's states, compared with the golden values.
AFTER_VISION = "activations after vision"
GRADIENTS_AFTER_VISION = "gradients after vision"

# Errors of the golden values against fp64. The files are fixed, so only fp64's own rounding differs between machines.
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
    AFTER_VISION: 1.3e-5,
    GRADIENTS_AFTER_VISION: 2.7e-4,
}

# For the loss at each step of the golden training run, the largest error up to that step. A difference grows by a
# factor of 100 per step until the curves differ like two runs of the same training, and shrinks only by chance.
WORST_LOSS = (3.4e-7, 3.5e-5, 6.2e-4, 4.0e-3, 4.0e-3, 1.4e-2, *(1.6e-2,) * 6)

nearest: dict[str, tuple[float, float]] = {}
"""The largest error in this process and its bound, by the name of the result."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return ||got - expected|| / ||expected||, computed in fp64 on the CPU; infinity if there is a NaN."""
    assert got.shape == expected.shape
    got, expected = (value.detach().double().cpu() for value in (got, expected))
    error = ((got - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
    return float("inf") if math.isnan(error) else error


def between(values: Tensor) -> Tensor:
    """Return a threshold for `values` [N, ...] along the first dimension: the middle of the widest gap.

    A threshold that equals a value, as a median can, would let rounding decide the value's side.
    """
    ordered = values.sort(0).values
    gaps = ordered.diff(dim=0)
    widest = gaps.argmax(0, keepdim=True)
    return (ordered.gather(0, widest) + gaps.gather(0, widest) / 2).squeeze(0)


def rounding_bound(plain: Tensor, exact: Tensor) -> float:
    """Return the bound on a kernel's error against `exact`, from the plain formula's error in the same dtype.

    Both round equally often, so the bound is twice the formula's error plus one rounding of the result: with few
    elements, the formula may happen to be exact. The largest error seen is 0.57 of the bound.
    """
    return 2 * relative_error(plain, exact) + torch.finfo(plain.dtype).eps / 2


def expect_within(name: str, error: float, worst: float | None = None) -> None:
    """Assert that `error` is below `MARGIN` times `worst`, by default `WORST[name]`."""
    bound = MARGIN * (WORST[name] if worst is None else worst)
    nearest[name] = max(nearest.get(name, (0.0, bound)), (error, bound))
    assert error < bound, f"{name}: {error:.2e}, expected less than {bound:.2e}"


def expect_golden_curve(losses: Sequence[float], golden: Sequence[float]) -> None:
    """Assert that each step's loss equals the golden one within `WORST_LOSS`, times `MARGIN`."""
    assert len(losses) == len(golden) == len(WORST_LOSS)
    for step, (loss, expected, worst) in enumerate(zip(losses, golden, WORST_LOSS, strict=True), 1):
        expect_within(f"loss of step {step:2}", abs(loss - expected) / expected, worst)
