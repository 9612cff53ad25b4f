"""The gated GELU, forward, backward and both, compared with PyTorch's GELU and product.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Channels are those
of LION-FlanT5-XL's feed-forward (5120) and of XXL's (10240). Liger-Kernel's GEGLU is not a peer, because it uses GELU's
tanh approximation.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.side_by_side import (
    DTYPE,
    INTERLEAVED,
    Inputs,
    Operator,
    Suite,
    draw,
    leaf,
    measure,
    seeded,
)
from benchmarks.shapes import MANY, TOKENS, by_backend, cases, compiled_at_base, star
from lion_kernels.gated_gelu import cost, gated_gelu
from lion_reference import gated_gelu as reference

BASE = {"channels": 5120}
pytestmark = INTERLEAVED


def make_inputs(shape: dict[str, int]) -> Inputs:
    generator = seeded()
    size = shape["tokens"], shape["channels"]
    return {name: leaf(draw(*size, generator=generator)) for name in ("gate", "up")}


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


PEERS: dict[str, Operator] = {
    "eager": eager,
    "torch.compile": torch.compile(eager),
    **by_backend(gated_gelu),
}


def peers(shape: dict[str, int]) -> dict[str, Operator]:
    return compiled_at_base(PEERS, shape, BASE)


@cases(star({**BASE, "tokens": MANY}, {"tokens": TOKENS, "channels": (5120, 10240)}), peers)
def bench(benchmark: Callable, shape: dict[str, int], direction: str, peer: str) -> None:
    suite = Suite("gated_gelu", peers(shape), plain=eager, reference=reference)
    costs = cost(shape["tokens"], shape["channels"], DTYPE)
    measure(benchmark, suite, peer, direction, shape, partial(make_inputs, shape), costs)
