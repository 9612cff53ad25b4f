"""T5's attention, forward, backward and both, compared with SDPA (bias as a mask) and FlexAttention (as a score_mod).

`pytest benchmarks` prints the table. Shapes are LION-FlanT5-XL's (32 heads of 64, 32 buckets): an encoder over prefix
and text (417, and 1024 with long questions and tags), and a decoding step with few and with many sequences. flash-attn
does not support such a bias. FlexAttention has no backward on a CPU.
"""

import functools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
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
from lion_kernels import relative_bias_attention
from lion_kernels.relative_bias_attention import cost
from lion_reference import relative_bias_attention as reference
from lion_reference.relative_bias_attention import relative_position_bucket

HEADS, HEAD_DIM, BUCKETS, MAX_DISTANCE = 32, 64, 32, 128
ENCODER = [(1, 417)] if DEVICE.type == "cpu" else [(1, 417), (16, 417), (16, 1024)]
DECODER = [(1, 64), (5, 64)] if DEVICE.type == "cpu" else [(1, 64), (5, 64), (64, 64)]
SHAPES = [{"stack": "encoder", "batch": batch, "queries": n, "keys": n} for batch, n in ENCODER]
SHAPES += [{"stack": "decoder", "batch": batch, "queries": 1, "keys": keys} for batch, keys in DECODER]
pytestmark = INTERLEAVED


def make_inputs(shape: dict) -> Inputs:
    generator = seeded()

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return leaf(draw(*size, generator=generator, scale=scale))

    return {
        "q": randn(shape["batch"], shape["queries"], HEADS, HEAD_DIM, scale=HEAD_DIM**-0.5),
        "k": randn(shape["batch"], shape["keys"], HEADS, HEAD_DIM),
        "v": randn(shape["batch"], shape["keys"], HEADS, HEAD_DIM),
        "bias_table": randn(BUCKETS, HEADS),
    }


@functools.cache
def distance_buckets(queries: int, keys: int, decoder: bool, device: torch.device) -> Tensor:
    """Return the bucket of each pair, [L, M]; computed once, as in T5 for all layers and in this project's kernels."""
    positions = torch.arange(keys, device=device)
    distance = positions[None, :] - positions[keys - queries :, None]
    return relative_position_bucket(distance, num_buckets=BUCKETS, max_distance=MAX_DISTANCE, bidirectional=not decoder)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, decoder: bool) -> Tensor:
    """Run SDPA without a causal mask, because a decoding step sees every key."""
    buckets = distance_buckets(q.shape[1], k.shape[1], decoder, q.device)
    bias = bias_table[buckets].permute(2, 0, 1)[None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=1.0
    )
    return out.transpose(1, 2)


def flex(attention: Callable[..., Tensor]) -> Operator:
    def call(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, decoder: bool) -> Tensor:
        buckets = distance_buckets(q.shape[1], k.shape[1], decoder, q.device)

        def biased(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias_table[buckets[i, j], head]

        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return attention(*heads_first, score_mod=biased, scale=1.0).transpose(1, 2)

    return call


def in_decoder(operator: Operator) -> Operator:
    """Pass `decoder` under the argument's name in lion_kernels and lion_reference."""
    return lambda *, decoder, **inputs: operator(
        **inputs, causal=decoder, bidirectional=not decoder, max_distance=MAX_DISTANCE
    )


PEERS: dict[str, Operator] = {
    "eager": in_decoder(reference),
    "SDPA with a mask": sdpa,
    "FlexAttention": flex(torch.compile(flex_attention)),
    "torch.compile": torch.compile(in_decoder(reference)),
    "lion_kernels-torch": in_decoder(partial(relative_bias_attention, backend="torch")),
}
if DEVICE.type == "cuda":
    PEERS["lion_kernels-triton"] = in_decoder(partial(relative_bias_attention, backend="triton"))


def peers(shape: dict) -> dict[str, Operator]:
    return one_compiled(PEERS, shape, SHAPES)


def suite(shape: dict) -> Suite:
    called = {name: partial(peer, decoder=shape["stack"] == "decoder") for name, peer in peers(shape).items()}
    formula = partial(in_decoder(reference), decoder=shape["stack"] == "decoder")
    return Suite("relative_bias_attention", called, formula, formula, forward_only=FLEX_FORWARD)


@cases(SHAPES, peers)
def bench(benchmark: Callable, shape: dict, direction: str, peer: str) -> None:
    q, k = (torch.empty(shape["batch"], shape[n], HEADS, HEAD_DIM, dtype=DTYPE) for n in ("queries", "keys"))
    costs = cost(q, k, causal=shape["stack"] == "decoder", learn_bias=True)
    measure(benchmark, suite(shape), peer, direction, shape, partial(make_inputs, shape), costs)
