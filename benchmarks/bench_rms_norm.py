"""T5's layer norm, forward and backward, beside transformers' T5LayerNorm and `F.rms_norm`.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Shapes are
LION-FlanT5-XL's (D 2048); rows are one decoding step, one image's prompt, and a batch of prompts. A time is
reported for a right result only, and beside it (`extra_info`) the least time in which an H200 could move its bytes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import DEVICE, Inputs, Operator, leaf, measure
from lion_kernels.rms_norm import cost, rms_norm
from lion_reference import rms_norm as reference

CHANNELS = 2048
EPS = 1e-6


def make_inputs(rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    values = {
        "x": torch.randn(rows, CHANNELS, generator=generator),
        "weight": torch.randn(CHANNELS, generator=generator),
    }
    return {name: leaf(value) for name, value in values.items()}


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """T5LayerNorm."""
    normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(weight.dtype)


def fused(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own, which rounds elsewhere in half precision."""
    return F.rms_norm(x, weight.shape, weight, EPS)


OPERATORS: dict[str, Operator] = {
    "eager": eager,
    "F.rms_norm": fused,
    "lion_kernels-torch": partial(rms_norm, eps=EPS, backend="torch"),
}
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(eager)
    OPERATORS["lion_kernels-triton"] = partial(rms_norm, eps=EPS, backend="triton")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("rows", [1, 320, 1280] if DEVICE.type == "cpu" else [1, 320, 16384])
def bench(benchmark: Callable, rows: int, backward: bool, operator: str) -> None:
    measure(
        benchmark,
        OPERATORS[operator],
        make_inputs(rows),
        plain=eager,
        reference=partial(reference, eps=EPS),
        costs=cost(rows, CHANNELS, torch.bfloat16),
        backward=backward,
        title=f"rms_norm, {rows} x {CHANNELS}",
    )
