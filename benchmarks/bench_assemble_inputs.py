"""The language model's input, forward, backward and both, compared with PyTorch's gather, select and concatenation.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Shapes are
LION-FlanT5-XL's and XXL's (D 2048 and 4096, 32128 tokens, a prefix of 289); the table is frozen.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.side_by_side import DEVICE, DTYPE, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import ON_GPU, by_backend, compare_peers, star
from lion_kernels.assemble_inputs import assemble_inputs, cost
from lion_reference import assemble_inputs as reference

VOCABULARY = 32128
PREFIX_LENGTH = 289
LENGTH = 64
SOFT_PROMPT_ID = 32099
BATCHES = (1, 16, 64) if ON_GPU else (1, 4)
SHAPES = star({"batch": BATCHES[-1], "channels": 2048}, {"batch": BATCHES, "channels": (2048, 4096)})


def make_inputs(batch: int, prefix: int, length: int, channels: int) -> Inputs:
    generator = seeded()
    sizes = {"prefix": (batch, prefix, channels), "soft_prompt": (channels,)}
    trained = {name: draw(*size, generator=generator) for name, size in sizes.items()}
    input_ids = torch.randint(0, SOFT_PROMPT_ID, (batch, length), generator=generator, device=DEVICE)
    input_ids[:, 3] = SOFT_PROMPT_ID
    return {
        **{name: leaf(value) for name, value in trained.items()},
        "embedding": draw(VOCABULARY, channels, generator=generator).to(DTYPE),
        "input_ids": input_ids,
    }


def eager(prefix: Tensor, input_ids: Tensor, embedding: Tensor, soft_prompt: Tensor) -> Tensor:
    text = torch.where((input_ids == SOFT_PROMPT_ID).unsqueeze(-1), soft_prompt, embedding[input_ids])
    return torch.cat([prefix, text], dim=1)


PEERS: dict[str, Operator] = {
    "eager": eager,
    "torch.compile": torch.compile(eager),
    **by_backend(assemble_inputs, soft_prompt_id=SOFT_PROMPT_ID),
}


def suite(shape: Shape) -> Suite:
    sizes = shape["batch"], shape.get("prefix", PREFIX_LENGTH), shape.get("length", LENGTH), shape["channels"]
    reads = partial(reference, soft_prompt_id=SOFT_PROMPT_ID)
    return Suite("assemble_inputs", PEERS, eager, reads, partial(make_inputs, *sizes), cost(*sizes, DTYPE))


bench = compare_peers(suite, SHAPES)
