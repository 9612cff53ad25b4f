"""T5's layer norm, forward, backward and both, compared with transformers' T5LayerNorm, `F.rms_norm` and Liger-Kernel.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. The base is
LION-FlanT5-XL's (D 2048); tokens and channels vary one at a time.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.side_by_side import DTYPE, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import CHANNELS, MANY, ON_GPU, TOKENS, by_backend, compare_peers, star
from lion_kernels.rms_norm import cost, rms_norm
from lion_reference import rms_norm as reference

try:
    from liger_kernel.transformers.functional import liger_rms_norm
except ImportError:
    liger_rms_norm = None

BASE = {"channels": 2048}
EPS = 1e-6


def make_inputs(shape: Shape) -> Inputs:
    generator = seeded()
    values = {
        "x": draw(shape["tokens"], shape["channels"], generator=generator),
        "weight": draw(shape["channels"], generator=generator),
    }
    return {name: leaf(value) for name, value in values.items()}


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """Compute T5LayerNorm."""
    normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(weight.dtype)


def fused(x: Tensor, weight: Tensor) -> Tensor:
    """Compute PyTorch's `F.rms_norm`, which rounds differently in half precision."""
    return F.rms_norm(x, weight.shape, weight, EPS)


PEERS: dict[str, Operator] = {
    "eager": eager,
    "F.rms_norm": fused,
    "torch.compile": torch.compile(eager),
    **by_backend(rms_norm, eps=EPS),
}
if ON_GPU and liger_rms_norm is not None:
    PEERS["Liger"] = lambda x, weight: liger_rms_norm(x, weight, EPS, in_place=False)


def suite(shape: Shape) -> Suite:
    costs = cost(shape["tokens"], shape["channels"], DTYPE)
    return Suite("rms_norm", PEERS, eager, partial(reference, eps=EPS), partial(make_inputs, shape), costs)


bench = compare_peers(suite, star({"tokens": MANY, **BASE}, {"tokens": TOKENS, "channels": CHANNELS}), BASE)
