"""The mixture of adapters, forward and backward, beside the original's eager form.

`pytest benchmarks` prints the table. Shapes are LION-FlanT5-XL's (D 2048, rank 64, 2 adapters) with channel gates by
task; rows are one decoding step, one image's prompt (320 tokens), and a batch of prompts.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import DEVICE, Inputs, Operator, leaf, measure
from lion_kernels import mixture_of_adapters
from lion_kernels.mixture_of_adapters import cost
from lion_reference import mixture_of_adapters as reference

EXPERTS, RANK, CHANNELS, TASKS = 2, 64, 2048, 2


def make_inputs(batch: int, length: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return leaf(torch.randn(*size, generator=generator).mul(scale))

    return {
        "x": randn(batch, length, CHANNELS),
        "down_weight": randn(EXPERTS, RANK, CHANNELS, scale=CHANNELS**-0.5),
        "down_bias": randn(EXPERTS, RANK),
        "up_weight": randn(EXPERTS, CHANNELS, RANK, scale=RANK**-0.5),
        "up_bias": randn(EXPERTS, CHANNELS),
        "gate": randn(TASKS, EXPERTS, CHANNELS),
        "residual": randn(batch, length, CHANNELS),
        "task_ids": torch.ones(batch, dtype=torch.int64, device=DEVICE),
    }


def eager(x, down_weight, down_bias, up_weight, up_bias, gate, residual, task_ids) -> Tensor:
    """Adapter by adapter, one task for the whole batch, as the original computes it."""
    out = residual
    for e in range(EXPERTS):
        update = F.linear(F.relu(F.linear(x, down_weight[e], down_bias[e])), up_weight[e], up_bias[e])
        out = out + gate[1, e] * update
    return out


OPERATORS: dict[str, Operator] = {"eager": eager, "lion_kernels-torch": partial(mixture_of_adapters, backend="torch")}
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(reference)
    OPERATORS["lion_kernels-triton"] = partial(mixture_of_adapters, backend="triton")
SIZES = [(1, 1), (1, 320), (4, 320)] if DEVICE.type == "cpu" else [(1, 1), (1, 320), (51, 320)]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("batch", "length"), SIZES)
def bench(benchmark: Callable, batch: int, length: int, backward: bool, operator: str) -> None:
    measure(
        benchmark,
        OPERATORS[operator],
        make_inputs(batch, length),
        plain=reference,
        reference=reference,
        costs=cost(batch * length, CHANNELS, EXPERTS, RANK, torch.bfloat16),
        backward=backward,
        title=f"mixture_of_adapters, {batch} x {length} x {CHANNELS}, E {EXPERTS}, r {RANK}",
    )
