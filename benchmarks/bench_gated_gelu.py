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

from lion_kernels.cost import H200, floor_seconds
from lion_kernels.gated_gelu import cost, gated_gelu
from lion_reference import gated_gelu as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CHANNELS = 5120
Inputs = dict[str, Tensor]


def make_inputs(rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(rows, CHANNELS, generator=generator) for name in ("gate", "up")}
    return {name: value.to(DEVICE, DTYPE).requires_grad_() for name, value in values.items()}


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "lion_kernels-torch": partial(gated_gelu, backend="torch"),
}
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(eager)
    OPERATORS["lion_kernels-triton"] = partial(gated_gelu, backend="triton")


def run(operator: Callable[..., Tensor], inputs: Inputs, grad: Tensor | None) -> None:
    """Forward, and with `grad` backward too, until the device is done."""
    if grad is None:
        with torch.no_grad():
            operator(**inputs)
    else:
        torch.autograd.grad(operator(**inputs), [value for value in inputs.values() if value.requires_grad], grad)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def relative_error(out: Tensor, inputs: Inputs) -> float:
    exact = reference(**{name: v.double() if v.is_floating_point() else v for name, v in inputs.items()})
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("rows", [1, 320, 1280] if DEVICE.type == "cpu" else [1, 320, 16384])
def bench(benchmark, rows: int, backward: bool, operator: str) -> None:
    inputs = make_inputs(rows)
    out = OPERATORS[operator](**inputs)
    error, allowed = relative_error(out, inputs), max(1e-5, 2 * relative_error(eager(**inputs), inputs))
    assert error < allowed, f"wrong result (relative error {error:.1e}, allowed {allowed:.1e}), so no time"
    costs = cost(rows, CHANNELS, torch.bfloat16)
    floor = sum(floor_seconds(part, H200, torch.bfloat16) for part in costs[: 1 + backward])
    benchmark.extra_info["floor of an H200 in bf16, us"] = round(1e6 * floor, 2)
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"gated_gelu, {direction}, {rows} rows of {CHANNELS}, {DTYPE}, {DEVICE}"
    benchmark(run, OPERATORS[operator], inputs, torch.randn_like(out) if backward else None)
