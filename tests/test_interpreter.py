"""The patches of Triton's interpreter keep its checks and results."""

from typing import Any

import pytest
import torch

from lion_kernels.core.backend import interpreting

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(not interpreting(), reason="the kernels are compiled in this process")

MOST = 2**31 - 1


@triton.jit
def _add(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def _subtract(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) - tl.load(y + at))


@triton.jit
def _multiply(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) * tl.load(y + at))


@triton.jit
def _outer_product(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at[:, None] * N + at, tl.load(x + at)[:, None] * tl.load(y + at))


KERNELS = {"add": (_add, torch.add), "sub": (_subtract, torch.sub), "mul": (_multiply, torch.mul)}


def run(kernel: Any, x: torch.Tensor, y: torch.Tensor, shape: tuple[int, ...] = (4,)) -> torch.Tensor:
    out = torch.empty(shape, dtype=torch.promote_types(x.dtype, y.dtype))
    kernel[(1,)](x, y, out, N=4)
    return out


@pytest.mark.parametrize(("name", "x", "y"), [("add", MOST, 1), ("sub", -MOST - 1, 1), ("mul", -(2**16), 2**15 + 1)])
def test_overflow_is_detected(name: str, x: int, y: int) -> None:
    kernel, _ = KERNELS[name]
    others = [torch.tensor([0, 1, 2, value], dtype=torch.int32) for value in (x, y)]
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {name}"):
        run(kernel, *others)


@pytest.mark.parametrize("name", KERNELS)
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
def test_operands_are_converted_as_in_torch(name: str, x: torch.dtype, y: torch.dtype) -> None:
    kernel, expected = KERNELS[name]
    values = torch.tensor([3, -7, 0, 11]).to(x), torch.tensor([2, 5, -9, 1]).to(y)
    assert torch.equal(run(kernel, *values), expected(*values))


def test_shapes_are_broadcast() -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, -1.0, 2.0, 8.0])
    assert torch.equal(run(_outer_product, x, y, (4, 4)), torch.outer(x, y))
