"""T5's attention, forward and backward, beside SDPA with the bias as a mask, and FlexAttention with it as a score_mod.

`pytest benchmarks` prints the table. Shapes are LION-FlanT5-XL's (32 heads of 64, 32 buckets): an encoder over prefix
and text (417), and a decoding step. flash-attn takes no such bias. FlexAttention has no backward on a CPU, so it is a
peer on a GPU only.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import DEVICE, Inputs, Operator, leaf, measure
from lion_kernels import relative_bias_attention
from lion_kernels.relative_bias_attention import cost
from lion_reference import relative_bias_attention as reference
from lion_reference.relative_bias_attention import relative_position_bucket

HEADS, HEAD_DIM, BUCKETS, MAX_DISTANCE = 32, 64, 32, 128
BATCH = 1 if DEVICE.type == "cpu" else 16
# queries, keys, whether in the decoder
SHAPES = {"encoder": (417, 417, False), "a step of decoding": (1, 64, True)}


def make_inputs(queries: int, keys: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return leaf(torch.randn(*size, generator=generator) * scale)

    return {
        "q": randn(BATCH, queries, HEADS, HEAD_DIM, scale=HEAD_DIM**-0.5),
        "k": randn(BATCH, keys, HEADS, HEAD_DIM),
        "v": randn(BATCH, keys, HEADS, HEAD_DIM),
        "bias_table": randn(BUCKETS, HEADS),
    }


def distance_buckets(q: Tensor, k: Tensor, decoder: bool) -> Tensor:
    """The bucket of each pair, [L, M]."""
    positions = torch.arange(k.shape[1], device=q.device)
    distance = positions[None, :] - positions[k.shape[1] - q.shape[1] :, None]
    return relative_position_bucket(distance, num_buckets=BUCKETS, max_distance=MAX_DISTANCE, bidirectional=not decoder)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, decoder: bool) -> Tensor:
    """A step of decoding sees every key, so nothing is masked."""
    bias = bias_table[distance_buckets(q, k, decoder)].permute(2, 0, 1)[None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=1.0
    )
    return out.transpose(1, 2)


def flex(attention: Callable[..., Tensor]) -> Operator:
    def call(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, decoder: bool) -> Tensor:
        buckets = distance_buckets(q, k, decoder)

        def biased(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias_table[buckets[i, j], head]

        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return attention(*heads_first, score_mod=biased, scale=1.0).transpose(1, 2)

    return call


def in_decoder(operator: Operator) -> Operator:
    """`operator` of lion_kernels or lion_reference, by the name that the peers use."""
    return lambda *, decoder, **inputs: operator(
        **inputs, causal=decoder, bidirectional=not decoder, max_distance=MAX_DISTANCE
    )


OPERATORS: dict[str, Operator] = {
    "eager": in_decoder(reference),
    "SDPA with a mask": sdpa,
    "lion_kernels-torch": in_decoder(partial(relative_bias_attention, backend="torch")),
}
if DEVICE.type == "cuda":
    from torch.nn.attention.flex_attention import flex_attention

    OPERATORS |= {
        "FlexAttention": flex(torch.compile(flex_attention)),
        "torch.compile": torch.compile(in_decoder(reference)),
        "lion_kernels-triton": in_decoder(partial(relative_bias_attention, backend="triton")),
    }


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES)
def bench(benchmark: Callable, shape: str, backward: bool, operator: str) -> None:
    queries, keys, decoder = SHAPES[shape]
    inputs = make_inputs(queries, keys)
    half = {name: value.detach().bfloat16() for name, value in inputs.items()}
    measure(
        benchmark,
        partial(OPERATORS[operator], decoder=decoder),
        inputs,
        plain=partial(in_decoder(reference), decoder=decoder),
        reference=partial(in_decoder(reference), decoder=decoder),
        costs=cost(half["q"], half["k"], causal=decoder, learn_bias=True),
        backward=backward,
        title=f"relative_bias_attention, {shape}, {BATCH} x {queries} to {keys}, {HEADS} heads of {HEAD_DIM}",
    )
