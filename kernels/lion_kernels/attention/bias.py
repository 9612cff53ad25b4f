"""T5's bias by bucketed distance: the buckets, and the table's gradient from the gradient of the scores.

The gradient sums ds over the pairs of a bucket, in two stages of fixed order. A program traverses one diagonal of
tiles, where each element of the tile has the same distance in every tile. It recomputes ds, adds the tiles in registers
and sorts only the final sum into buckets. The second stage adds the programs' buckets; there are O(L + M) programs.
"""

# Launches pass plain values as constexpr arguments, and have additional keywords.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from functools import cache

import torch
from torch import Tensor

from lion_kernels.attention.launch import Attention
from lion_kernels.attention.sizes import bias_gradient_sizes, split_head_dim
from lion_kernels.attention.specs import kernel_spec
from lion_kernels.attention.tiles import (
    Head,
    dropout_keep,
    load_keys_and_score,
    load_rows,
    load_values,
    locate,
    score_gradient,
)
from lion_kernels.core import tuned_sizes
from lion_kernels.core.backend import LAUNCH, on_device, tl, triton
from lion_kernels.core.specs import KernelSpec

_NOT_SPECIALIZED = [
    *(f"stride_{tensor}_{dim}" for tensor in ("q", "k", "v") for dim in ("batch", "row", "head")),
    *("batch", "queries", "keys", "heads", "reach", "num_buckets", "diagonals", "chunk", "i_map", "threshold"),
]


@triton.jit
def _score_gradient(head, p_grad, p_lse, p_delta, stride_grad, i_row, i_column, BLOCK: tl.constexpr):
    """Compute ds of BLOCK queries from i_row on and BLOCK keys from i_column on."""
    o_row = i_row + tl.arange(0, BLOCK)
    m_row = o_row < head.queries
    b_q = load_rows(head.p_q, head.stride_q, i_row, m_row, head, BLOCK)
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
    # [BLOCK, BLOCK], queries by keys
    _, b_s = load_keys_and_score(b_q, head, i_row, i_column, BLOCK, BLOCK, True)
    b_p = tl.math.exp2(b_s - b_lse[:, None])
    b_g = load_rows(p_grad, stride_grad, i_row, m_row, head, BLOCK)
    b_v = load_values(head, i_column, BLOCK, True)
    b_keep = None
    if head.p_seed is not None:
        b_keep = dropout_keep(head, i_row, i_column, BLOCK, BLOCK, False)
    return score_gradient(b_p, b_delta, b_g, b_v, b_keep, head)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _bias_gradient(
    p_q,  # [B, L, H, Dh]
    p_k,  # [B, M, H, Dh]
    p_v,  # [B, M, H, Dh]
    p_mask,  # [B, M] bytes, or None
    p_bias,  # [H, 2 * reach + 1]
    p_seed,  # int64 [], or None
    p_bucket,  # [2 * reach + 1]
    p_grad,  # [B, L, H, Dh]
    p_lse,  # [B, H, L]
    p_delta,  # [B, H, L]
    p_out,  # [chunks * diagonals, H, num_buckets]
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    batch,
    queries,
    keys,
    heads,
    reach,
    num_buckets,
    diagonals,
    chunk,
    i_map,
    scale,
    threshold,
    rescale,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ds by bucket for one diagonal of tiles [BLOCK, BLOCK] of one head, over `chunk` batch elements."""
    i_h = tl.program_id(0) % heads
    i_out = tl.program_id(0) // heads
    i_diagonal = i_out % diagonals - (tl.cdiv(queries, BLOCK) - 1)
    i_chunk = i_out // diagonals
    begin = tl.maximum(-i_diagonal, 0)
    length = tl.minimum(tl.cdiv(queries, BLOCK), tl.cdiv(keys, BLOCK) - i_diagonal) - begin
    count = tl.minimum(batch - i_chunk * chunk, chunk)
    p_bias += i_h * (2 * reach + 1)
    stride_grad = heads.to(tl.int64) * HEAD_DIM

    o_tile = tl.arange(0, BLOCK)
    b_total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, count * length):
        i_b = (i_chunk * chunk + i // length).to(tl.int64)
        i_bh = i_b * heads + i_h
        i_row = (begin + i % length) * BLOCK
        i_column = i_row + i_diagonal * BLOCK
        located = locate(
            p_q, p_k, p_v, stride_q_batch, stride_q_row, stride_q_head, stride_k_batch, stride_k_row, stride_k_head,
            stride_v_batch, stride_v_row, stride_v_head, i_b, i_h.to(tl.int64), UNIT,
        )  # fmt: skip
        b_total += _score_gradient(
            Head(
                *located, None if p_mask is None else p_mask + i_b * keys, p_bias, queries, keys, keys - queries, reach,
                scale, i_bh.to(tl.int32), i_map, p_seed, threshold, rescale, HEAD_DIM, D1, D2, CAUSAL, PRECISION,
            ),
            p_grad + i_b * queries * stride_grad + i_h * HEAD_DIM, p_lse + i_bh * queries, p_delta + i_bh * queries,
            stride_grad, i_row, i_column, BLOCK,
        )  # fmt: skip

    o_distance = i_diagonal * BLOCK + o_tile[None, :] - (keys - queries + o_tile)[:, None]
    b_bucket = tl.load(p_bucket + tl.minimum(tl.maximum(o_distance, -reach), reach) + reach)
    p_out += (i_out.to(tl.int64) * heads + i_h) * num_buckets
    for i in range(0, num_buckets):
        tl.store(p_out + i, tl.sum(tl.where(b_bucket == i, b_total, 0.0)))


def launch_bias_gradient(
    one: Attention, grad: Tensor, lse: Tensor, delta: Tensor, bias_table: Tensor, bidirectional: bool
) -> Tensor:
    """Return the gradient of the table [num_buckets, H], in its dtype."""
    (batch, queries, heads, _), keys, num_buckets = one.q.shape, one.k.shape[1], bias_table.shape[0]
    if not (grad.numel() and keys):
        return bias_table.new_zeros(bias_table.shape)
    width = sum(split_head_dim(one.q.shape[-1]))
    compact = tuned_sizes.is_compact(one.q.device)
    sizes = bias_gradient_sizes(one.q.dtype, width, dropout=one.seed is not None, compact=compact)
    block = sizes["BLOCK"]
    last = triton.cdiv(keys, block) - 1
    if one.causal:
        last = min(last, (block - 1 + keys - queries) // block)
    diagonals = triton.cdiv(queries, block) + last
    # Enough programs for any GPU, from the shape alone: the order of the sum must not depend on the GPU.
    chunk = triton.cdiv(batch, triton.cdiv(1024, heads * diagonals))
    parts = triton.cdiv(batch, max(chunk, 1)) * diagonals
    partial = grad.new_empty(parts, heads, num_buckets, dtype=torch.float32)
    with on_device(grad):
        _bias_gradient[(parts * heads,)](
            p_bucket=bucket_by_distance(num_buckets, one.reach, bidirectional, grad.device),
            p_grad=grad,
            p_lse=lse,
            p_delta=delta,
            p_out=partial,
            batch=batch,
            num_buckets=num_buckets,
            diagonals=diagonals,
            chunk=chunk,
            **one.arguments("bias_gradient"),
            **sizes,
            **LAUNCH,
        )
    return partial.sum(0).t().to(bias_table.dtype).contiguous()


def relative_position_bucket(distance: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Return the bucket of each distance (key position - query position, integers of any shape).

    Half of the buckets hold one distance each. The other half divides the distances up to `max_distance` evenly on a
    logarithmic scale, and its last bucket holds all distances beyond. If `bidirectional`, there is one such series for
    keys at or before the query and another for keys after it; otherwise keys after the query are in bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        first = torch.zeros_like(distance)
        distance = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    # fp32 for any model dtype, because the published weights were trained with these bucket boundaries.
    position = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (position * (num_buckets - num_exact)).long()
    return first + torch.where(distance < num_exact, distance, logarithmic.clamp(max=num_buckets - 1))


@cache
def bucket_by_distance(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """Return the buckets of the distances -max_distance .. max_distance, computed on the CPU as the reference.

    The rounding of the logarithm does not matter at max_distance, because the last bucket starts a whole step earlier.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    return relative_position_bucket(distance, num_buckets, max_distance, bidirectional).to(device)


def bias_gradient_spec(name: str, head_dim: int, dtype: torch.dtype, dropout: bool, compact: bool) -> KernelSpec:
    """Return the spec of `_bias_gradient` as `launch_bias_gradient` launches it."""
    sizes = bias_gradient_sizes(dtype, sum(split_head_dim(head_dim)), dropout=dropout, compact=compact)
    kind = "fp32" if dtype == torch.float32 else "bf16"
    suffix = f"{' dropout' if dropout else ''}{' compact' if compact else ''}"
    return kernel_spec(
        f"{name} bias_gradient {kind} Dh={head_dim} {sizes['BLOCK']}{suffix}",
        "bias_gradient",
        _bias_gradient,
        head_dim,
        dtype,
        sizes,
        {"BLOCK": sizes["BLOCK"], "CAUSAL": False, **({} if dropout else {"p_seed": None})},
        {"p_out": "*fp32", "p_bucket": "*i64"},
        product_rows=sizes["BLOCK"],
        compact=compact,
    )
