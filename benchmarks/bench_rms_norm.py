"""T5's layer norm, forward, backward and both, compared with transformers' T5LayerNorm, `F.rms_norm` and Liger-Kernel.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. The base is
LION-FlanT5-XL's (D 2048); tokens and channels vary one at a time.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.side_by_side import (
    DEVICE,
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
from benchmarks.shapes import by_backend, cases, compiled_at_base, rows
from lion_kernels.rms_norm import cost, rms_norm
from lion_reference import rms_norm as reference

try:
    from liger_kernel.transformers.functional import liger_rms_norm
except ImportError:
    liger_rms_norm = None

BASE = {"channels": 2048}
EPS = 1e-6
pytestmark = INTERLEAVED


def make_inputs(shape: dict[str, int]) -> Inputs:
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
if DEVICE.type == "cuda" and liger_rms_norm is not None:
    PEERS["Liger"] = lambda x, weight: liger_rms_norm(x, weight, EPS, in_place=False)


def peers(shape: dict[str, int]) -> dict[str, Operator]:
    return compiled_at_base(PEERS, shape, BASE)


@cases(rows(**BASE), peers)
def bench(benchmark: Callable, shape: dict[str, int], direction: str, peer: str) -> None:
    suite = Suite("rms_norm", peers(shape), plain=eager, reference=partial(reference, eps=EPS))
    costs = cost(shape["tokens"], shape["channels"], DTYPE)
    measure(benchmark, suite, peer, direction, shape, partial(make_inputs, shape), costs)
