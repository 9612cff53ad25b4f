"""Attention to feature maps, forward, backward and both, compared with SDPA's backends, FlexAttention and flash-attn.

`pytest benchmarks` prints the table. Shapes are EVA's self-attention (257 tokens, 16 heads of 88), the vision
aggregator's two maps with one softmax each, and the Q-Former's 32 queries (12 heads of 64). Peers with a single softmax
run once per map.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.harness.side_by_side import (
    DEVICE,
    DTYPE,
    FLEX_FORWARD,
    INTERLEAVED,
    Inputs,
    Operator,
    Suite,
    draw,
    leaf,
    measure,
    seeded,
)
from benchmarks.shapes import cases, one_compiled
from lion_kernels import multi_scale_attention
from lion_kernels.multi_scale_attention import cost
from lion_reference import multi_scale_attention as reference

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

BATCHES = (1, 4) if DEVICE.type == "cpu" else (1, 16, 64)
# queries, maps of 257 keys, heads, head_dim
PARTS = {"EVA": (257, 1, 16, 88), "aggregator": (257, 2, 16, 88), "Q-Former": (32, 1, 12, 64)}
SHAPES = [{"part": part, "batch": batch} for part in PARTS for batch in BATCHES]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
pytestmark = INTERLEAVED


def make_inputs(shape: dict) -> Inputs:
    generator = seeded()
    queries, maps, heads, head_dim = PARTS[shape["part"]]

    def randn(length: int) -> Tensor:
        return leaf(draw(shape["batch"], length, heads, head_dim, generator=generator))

    return {"q": randn(queries), **{f"{name}{s}": randn(257) for s in range(maps) for name in ("k", "v")}}


def gathered(operator: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]) -> Operator:
    """Convert an operator on lists of maps to one on k0, v0, k1, v1 ..."""

    def call(q: Tensor, **maps: Tensor) -> Tensor:
        number = len(maps) // 2
        return operator(q, [maps[f"k{s}"] for s in range(number)], [maps[f"v{s}"] for s in range(number)])

    return call


def map_by_map(attention: Attention) -> Operator:
    def call(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        outputs = [attention(q, k, v) for k, v in zip(keys, values, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs, dim=2)

    return gathered(call)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def sdpa_by(backend: SDPBackend) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return call


compiled_flex = torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


PEERS: dict[str, Operator] = {
    "eager": gathered(reference),
    "SDPA": map_by_map(sdpa),
    "FlexAttention": map_by_map(flex),
    "torch.compile": torch.compile(gathered(reference)),
    "lion_kernels-torch": gathered(partial(multi_scale_attention, backend="torch")),
}
if DEVICE.type == "cuda":
    PEERS |= {
        "SDPA-flash": map_by_map(sdpa_by(SDPBackend.FLASH_ATTENTION)),
        "SDPA-cuDNN": map_by_map(sdpa_by(SDPBackend.CUDNN_ATTENTION)),
        "SDPA-efficient": map_by_map(sdpa_by(SDPBackend.EFFICIENT_ATTENTION)),
        "lion_kernels-triton": gathered(partial(multi_scale_attention, backend="triton")),
    }
    if flash_attn_func is not None:
        PEERS["flash-attn"] = map_by_map(flash_attn_func)


def peers(shape: dict) -> dict[str, Operator]:
    return one_compiled(PEERS, shape, SHAPES)


@cases(SHAPES, peers)
def bench(benchmark: Callable, shape: dict, direction: str, peer: str) -> None:
    formula = gathered(reference)
    suite = Suite("multi_scale_attention", peers(shape), formula, formula, forward_only=FLEX_FORWARD)
    queries, maps, heads, head_dim = PARTS[shape["part"]]
    q, k = (torch.empty(shape["batch"], length, heads, head_dim, dtype=DTYPE) for length in (queries, 257))
    measure(benchmark, suite, peer, direction, shape, partial(make_inputs, shape), cost(q, [k] * maps))
