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

from benchmarks.harness.side_by_side import DTYPE, FLEX_FORWARD, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import ON_GPU, by_backend, compare_peers
from lion_kernels import relative_bias_attention
from lion_kernels.relative_bias_attention import cost
from lion_reference import relative_bias_attention as reference
from lion_reference.relative_bias_attention import relative_position_bucket

HEADS, HEAD_DIM, BUCKETS, MAX_DISTANCE = 32, 64, 32, 128
ENCODER = [(1, 417), (16, 417), (16, 1024)] if ON_GPU else [(1, 417)]
DECODER = [(1, 64), (5, 64), (64, 64)] if ON_GPU else [(1, 64), (5, 64)]
SHAPES = [{"stack": "encoder", "batch": batch, "queries": n, "keys": n} for batch, n in ENCODER]
SHAPES += [{"stack": "decoder", "batch": batch, "queries": 1, "keys": keys} for batch, keys in DECODER]


def make_inputs(q: Tensor, k: Tensor, learn_bias: bool) -> Inputs:
    """Draw inputs of the sizes of `q` and `k`."""
    generator = seeded()
    _, _, heads, head_dim = q.shape
    inputs = {
        "q": leaf(draw(*q.shape, generator=generator, scale=head_dim**-0.5)),
        "k": leaf(draw(*k.shape, generator=generator)),
        "v": leaf(draw(*k.shape, generator=generator)),
        "bias_table": leaf(draw(BUCKETS, heads, generator=generator)),
    }
    inputs["bias_table"].requires_grad_(learn_bias)
    return inputs


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
    **{name: in_decoder(ours) for name, ours in by_backend(relative_bias_attention).items()},
}


def suite(shape: Shape, learn_bias: bool = True) -> Suite:
    decoder, heads = shape["stack"] == "decoder", (shape.get("heads", HEADS), shape.get("head_dim", HEAD_DIM))
    q, k = (torch.empty(shape["batch"], shape[n], *heads, dtype=DTYPE, device="meta") for n in ("queries", "keys"))
    operators = {name: partial(peer, decoder=decoder) for name, peer in PEERS.items()}
    formula, inputs = partial(in_decoder(reference), decoder=decoder), partial(make_inputs, q, k, learn_bias)
    costs = cost(q, k, causal=decoder, learn_bias=learn_bias)
    return Suite("relative_bias_attention", operators, formula, formula, inputs, costs, forward_only=FLEX_FORWARD)


bench = compare_peers(suite, SHAPES)
