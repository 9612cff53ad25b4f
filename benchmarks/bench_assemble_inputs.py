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

from benchmarks.side_by_side import DEVICE, DTYPE, Inputs, Operator, leaf, measure
from lion_kernels.assemble_inputs import assemble_inputs, cost
from lion_reference import assemble_inputs as reference

CHANNELS = 2048
VOCABULARY = 32128
PREFIX_LENGTH = 289
LENGTH = 64
SOFT_PROMPT_ID = 32099


def make_inputs(batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sizes = {"prefix": (batch, PREFIX_LENGTH, CHANNELS), "soft_prompt": (CHANNELS,)}
    trained = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    input_ids = torch.randint(0, SOFT_PROMPT_ID, (batch, LENGTH), generator=generator)
    input_ids[:, 3] = SOFT_PROMPT_ID
    return {
        **{name: leaf(value) for name, value in trained.items()},
        "embedding": torch.randn(VOCABULARY, CHANNELS, generator=generator).to(DEVICE, DTYPE),
        "input_ids": input_ids.to(DEVICE),
    }


def eager(prefix: Tensor, input_ids: Tensor, embedding: Tensor, soft_prompt: Tensor) -> Tensor:
    text = torch.where((input_ids == SOFT_PROMPT_ID).unsqueeze(-1), soft_prompt, embedding[input_ids])
    return torch.cat([prefix, text], dim=1)


OPERATORS: dict[str, Operator] = {
    "eager": eager,
    "lion_kernels-torch": partial(assemble_inputs, soft_prompt_id=SOFT_PROMPT_ID, backend="torch"),
}
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(eager)
    OPERATORS["lion_kernels-triton"] = partial(assemble_inputs, soft_prompt_id=SOFT_PROMPT_ID, backend="triton")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("batch", [1, 16])
def bench(benchmark: Callable, batch: int, backward: bool, operator: str) -> None:
    measure(
        benchmark,
        OPERATORS[operator],
        make_inputs(batch),
        plain=eager,
        reference=partial(reference, soft_prompt_id=SOFT_PROMPT_ID),
        costs=cost(batch, PREFIX_LENGTH, LENGTH, CHANNELS, torch.bfloat16),
        backward=backward,
        title=f"assemble_inputs, {batch} x ({PREFIX_LENGTH} + {LENGTH}) x {CHANNELS}",
    )
