"""The gated GELU, forward and backward, beside PyTorch's GELU and product.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Shapes are
LION-FlanT5-XL's (5120 channels); rows are one decoding step, one image's prompt, and a batch of prompts. A time is
reported for a right result only, and beside it (`extra_info`) the least time in which an H200 could move its bytes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import DEVICE, Inputs, Operator, leaf, measure
from lion_kernels.gated_gelu import cost, gated_gelu
from lion_reference import gated_gelu as reference

CHANNELS = 5120


def make_inputs(rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(rows, CHANNELS, generator=generator) for name in ("gate", "up")}
    return {name: leaf(value) for name, value in values.items()}


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


OPERATORS: dict[str, Operator] = {
    "eager": eager,
    "lion_kernels-torch": partial(gated_gelu, backend="torch"),
}
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(eager)
    OPERATORS["lion_kernels-triton"] = partial(gated_gelu, backend="triton")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("rows", [1, 320, 1280] if DEVICE.type == "cpu" else [1, 320, 16384])
def bench(benchmark: Callable, rows: int, backward: bool, operator: str) -> None:
    measure(
        benchmark,
        OPERATORS[operator],
        make_inputs(rows),
        plain=eager,
        reference=reference,
        costs=cost(rows, CHANNELS, torch.bfloat16),
        backward=backward,
        title=f"gated_gelu, {rows} x {CHANNELS}",
    )
