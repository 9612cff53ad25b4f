"""Triton's interpreter with the patches of `tests/interpreter.py` computes what PyTorch does."""

import pytest
import torch
from torch import Tensor

from lion_kernels.core.backend import interpreting

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(not interpreting(), reason="the kernels are compiled in this process")


@triton.jit
def _combine(x, y, out, N: tl.constexpr, OPERATION: tl.constexpr):
    at = tl.arange(0, N)
    lhs, rhs = tl.load(x + at), tl.load(y + at)
    if OPERATION == "add":
        tl.store(out + at, lhs + rhs)
    elif OPERATION == "sub":
        tl.store(out + at, lhs - rhs)
    elif OPERATION == "mul":
        tl.store(out + at, lhs * rhs)
    else:
        tl.store(out + at[:, None] * N + at, lhs[:, None] * rhs)


OPERATIONS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "outer": torch.outer}


def run(operation: str, x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty((4, 4) if operation == "outer" else 4, dtype=torch.promote_types(x.dtype, y.dtype))
    _combine[(1,)](x, y, out, N=4, OPERATION=operation)
    return out


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.int32, torch.int32),
        (torch.int32, torch.int64),
        (torch.int64, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_operands_are_converted_and_broadcast_as_in_torch(operation: str, x: torch.dtype, y: torch.dtype) -> None:
    operands = torch.tensor([3, -7, 0, 2**31 - 1]).to(x), torch.tensor([2, 5, -9, 1]).to(y)
    assert torch.equal(run(operation, *operands), OPERATIONS[operation](*operands))
