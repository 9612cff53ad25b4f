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

from benchmarks.harness.side_by_side import DTYPE, FLEX_FORWARD, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import ON_GPU, by_backend, compare_peers
from lion_kernels import multi_scale_attention
from lion_kernels.multi_scale_attention import cost
from lion_reference import multi_scale_attention as reference

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

BATCHES = (1, 16, 64) if ON_GPU else (1, 4)
PARTS = {
    "EVA": {"queries": 257, "maps": 1, "heads": 16, "head_dim": 88},
    "aggregator": {"queries": 257, "maps": 2, "heads": 16, "head_dim": 88},
    "Q-Former": {"queries": 32, "maps": 1, "heads": 12, "head_dim": 64},
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(q: Tensor, k: Tensor, maps: int) -> Inputs:
    """Draw inputs of the sizes of `q` and `k`."""
    generator = seeded()

    def randn(like: Tensor) -> Tensor:
        return leaf(draw(*like.shape, generator=generator))

    return {"q": randn(q), **{f"{name}{s}": randn(k) for s in range(maps) for name in ("k", "v")}}


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
    **{name: gathered(ours) for name, ours in by_backend(multi_scale_attention).items()},
}
if ON_GPU:
    PEERS |= {
        "SDPA-flash": map_by_map(sdpa_by(SDPBackend.FLASH_ATTENTION)),
        "SDPA-cuDNN": map_by_map(sdpa_by(SDPBackend.CUDNN_ATTENTION)),
        "SDPA-efficient": map_by_map(sdpa_by(SDPBackend.EFFICIENT_ATTENTION)),
    }
    if flash_attn_func is not None:
        PEERS["flash-attn"] = map_by_map(flash_attn_func)


def suite(shape: Shape) -> Suite:
    sizes = {"maps": 1, "keys": 257, **PARTS.get(shape.get("part", ""), {}), **shape}
    heads = sizes["heads"], sizes["head_dim"]
    q, k = (torch.empty(sizes["batch"], sizes[n], *heads, dtype=DTYPE, device="meta") for n in ("queries", "keys"))
    formula, inputs = gathered(reference), partial(make_inputs, q, k, sizes["maps"])
    costs = cost(q, [k] * sizes["maps"])
    return Suite("multi_scale_attention", PEERS, formula, formula, inputs, costs, forward_only=FLEX_FORWARD)


bench = compare_peers(suite, [{"part": part, "batch": batch} for part in PARTS for batch in BATCHES])
