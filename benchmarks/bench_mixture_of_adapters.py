"""The mixture of adapters, forward and backward, beside the original's eager form.

`pytest benchmarks` prints the table. Shapes are LION-FlanT5-XL's (D 2048, rank 64, 2 adapters) with channel gates by
task; rows are one decoding step, one image's prompt (320 tokens), and a small batch of prompts. A time is reported
for a right result only.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels import mixture_of_adapters
from lion_reference import mixture_of_adapters as reference

EXPERTS, RANK, CHANNELS, TASKS = 2, 64, 2048, 2
Inputs = dict[str, Tensor]


def make_inputs(batch: int, length: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator).mul(scale).requires_grad_()

    return {
        "x": randn(batch, length, CHANNELS),
        "down_weight": randn(EXPERTS, RANK, CHANNELS, scale=CHANNELS**-0.5),
        "down_bias": randn(EXPERTS, RANK),
        "up_weight": randn(EXPERTS, CHANNELS, RANK, scale=RANK**-0.5),
        "up_bias": randn(EXPERTS, CHANNELS),
        "gate": randn(TASKS, EXPERTS, CHANNELS),
        "residual": randn(batch, length, CHANNELS),
        "task_ids": torch.ones(batch, dtype=torch.int64),
    }


def eager(x, down_weight, down_bias, up_weight, up_bias, gate, residual, task_ids) -> Tensor:
    """Adapter by adapter, one task for the whole batch, as the original computes it."""
    out = residual
    for e in range(EXPERTS):
        update = F.linear(F.relu(F.linear(x, down_weight[e], down_bias[e])), up_weight[e], up_bias[e])
        out = out + gate[task_ids[0], e] * update
    return out


def forward(operator: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return operator(**inputs)


def forward_backward(operator: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    wanted = [value for value in inputs.values() if value.is_floating_point()]
    return torch.autograd.grad(operator(**inputs).sum(), wanted)


@pytest.mark.parametrize("operator", [eager, mixture_of_adapters], ids=["eager", "lion_kernels-torch"])
@pytest.mark.parametrize("direction", [forward, forward_backward], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 320), (4, 320)])
def bench(benchmark, batch: int, length: int, direction: Callable, operator: Callable[..., Tensor]) -> None:
    inputs = make_inputs(batch, length)
    out = operator(**inputs)
    exact = reference(**{name: v.double() if v.is_floating_point() else v for name, v in inputs.items()})
    error = ((out - exact).norm() / exact.norm()).item()
    assert error < 1e-5, f"wrong result (relative error {error:.1e}), so no time"
    benchmark.group = f"mixture_of_adapters, {direction.__name__}, {batch} x {length} tokens, fp32"
    benchmark(direction, operator, inputs)
