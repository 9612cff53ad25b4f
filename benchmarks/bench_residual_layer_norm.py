"""BERT's bias, residual and norm, forward and backward, beside the chain of PyTorch's operators.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Shapes
are the vision aggregator's (D 1408, 257 tokens an image); eager dropout draws another mask, so there is none. A time is
reported for a right result only, and beside it (`extra_info`) the least time in which an H200 could move its bytes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import DEVICE, Inputs, Operator, leaf, measure
from lion_kernels.residual_layer_norm import cost, residual_layer_norm
from lion_reference import residual_layer_norm as reference

CHANNELS = 1408
TOKENS = 257
EPS = 1e-12


def make_inputs(images: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, channels = (images, TOKENS, CHANNELS), (CHANNELS,)
    sizes = {"x": rows, "residual": rows, "weight": channels, "bias": channels, "x_bias": channels}
    values = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {name: leaf(value) for name, value in values.items()}


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(x + x_bias + residual, weight.shape, weight, bias, EPS)


OPERATORS: dict[str, Operator] = {
    "eager": eager,
    "lion_kernels-torch": partial(residual_layer_norm, eps=EPS, backend="torch"),
}
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(eager)
    OPERATORS["lion_kernels-triton"] = partial(residual_layer_norm, eps=EPS, backend="triton")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("images", [1, 4] if DEVICE.type == "cpu" else [1, 64])
def bench(benchmark: Callable, images: int, backward: bool, operator: str) -> None:
    measure(
        benchmark,
        OPERATORS[operator],
        make_inputs(images),
        plain=eager,
        reference=partial(reference, eps=EPS),
        costs=cost(images * TOKENS, CHANNELS, torch.bfloat16),
        backward=backward,
        title=f"residual_layer_norm, {images} x {TOKENS} x {CHANNELS}",
    )
