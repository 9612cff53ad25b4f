"""The language model's input, forward and backward, beside PyTorch's gather, select and concatenation.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Shapes
are LION-FlanT5-XL's (D 2048, 32128 tokens, a prefix of 289); the table is frozen. A time is
reported for a right result only, and beside it (`extra_info`) the least time in which an H200 could move its bytes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lion_kernels.assemble_inputs import assemble_inputs, cost
from lion_kernels.cost import H200, floor_seconds
from lion_reference import assemble_inputs as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CHANNELS = 2048
VOCABULARY = 32128
PREFIX_LENGTH = 289
LENGTH = 64
SOFT_PROMPT_ID = 32099
Inputs = dict[str, Tensor]


def make_inputs(batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sizes = {"prefix": (batch, PREFIX_LENGTH, CHANNELS), "soft_prompt": (CHANNELS,)}
    trained = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    input_ids = torch.randint(0, SOFT_PROMPT_ID, (batch, LENGTH), generator=generator)
    input_ids[:, 3] = SOFT_PROMPT_ID
    return {
        **{name: value.to(DEVICE, DTYPE).requires_grad_() for name, value in trained.items()},
        "embedding": torch.randn(VOCABULARY, CHANNELS, generator=generator).to(DEVICE, DTYPE),
        "input_ids": input_ids.to(DEVICE),
    }


def eager(prefix: Tensor, input_ids: Tensor, embedding: Tensor, soft_prompt: Tensor) -> Tensor:
    text = torch.where((input_ids == SOFT_PROMPT_ID).unsqueeze(-1), soft_prompt, embedding[input_ids])
    return torch.cat([prefix, text], dim=1)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "lion_kernels-torch": partial(assemble_inputs, soft_prompt_id=SOFT_PROMPT_ID, backend="torch"),
}
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(eager)
    OPERATORS["lion_kernels-triton"] = partial(assemble_inputs, soft_prompt_id=SOFT_PROMPT_ID, backend="triton")


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
    exact = reference(
        **{name: v.double() if v.is_floating_point() else v for name, v in inputs.items()},
        soft_prompt_id=SOFT_PROMPT_ID,
    )
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("batch", [1, 16])
def bench(benchmark, batch: int, backward: bool, operator: str) -> None:
    inputs = make_inputs(batch)
    out = OPERATORS[operator](**inputs)
    error, allowed = relative_error(out, inputs), max(1e-5, 2 * relative_error(eager(**inputs), inputs))
    assert error < allowed, f"wrong result (relative error {error:.1e}, allowed {allowed:.1e}), so no time"
    costs = cost(batch, PREFIX_LENGTH, LENGTH, CHANNELS, torch.bfloat16)
    floor = sum(floor_seconds(part, H200, torch.bfloat16) for part in costs[: 1 + backward])
    benchmark.extra_info["floor of an H200 in bf16, us"] = round(1e6 * floor, 2)
    direction = "forward+backward" if backward else "forward"
    benchmark.group = (
        f"assemble_inputs, {direction}, {batch} x ({PREFIX_LENGTH} + {LENGTH}) rows of {CHANNELS}, {DTYPE}, {DEVICE}"
    )
    benchmark(run, OPERATORS[operator], inputs, torch.randn_like(out) if backward else None)
