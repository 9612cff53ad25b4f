"""The gated GELU, forward, backward and both, compared with PyTorch's GELU and product.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Channels are those
of LION-FlanT5-XL's feed-forward (5120) and of XXL's (10240). Liger-Kernel's GEGLU is not a peer, because it uses GELU's
tanh approximation.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.side_by_side import DTYPE, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import MANY, TOKENS, by_backend, compare_peers, star
from lion_kernels.gated_gelu import cost, gated_gelu
from lion_reference import gated_gelu as reference

BASE = {"channels": 5120}


def make_inputs(shape: Shape) -> Inputs:
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


def suite(shape: Shape) -> Suite:
    costs = cost(shape["tokens"], shape["channels"], DTYPE)
    return Suite("gated_gelu", PEERS, eager, reference, partial(make_inputs, shape), costs)


bench = compare_peers(suite, star({**BASE, "tokens": MANY}, {"tokens": TOKENS, "channels": (5120, 10240)}), BASE)
