"""Attention without a matrix of scores in memory (FlashAttention, Dao et al., arXiv 2205.14135 and 2307.08691).

For a tile of queries, iterating over tiles of keys with a running maximum and sum:

    s = scale q k^T + bias[key position - query position]
    out = sum_j r_j p_j v_j,   p = exp(s - lse),   lse = log sum exp s,   r = 0 or 1 / (1 - dropout_p)

A length slightly above a multiple of the tile gets a narrow last tile: 257 = 4 * 64 + 16, with 15 masked. The last tile
comes first: with a product after the loop, or with none outside it, ptxas waits for every step of the loop's products
(its warning C7515).
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

from lion_kernels.attention.tiles import (
    Head,
    add_weighted,
    dropout_keep,
    load_keys_and_score,
    load_rows,
    load_values,
    locate,
    scale_rows,
    store_rows,
    zero_rows,
)
from lion_kernels.core.backend import tl, triton

# Lengths and strides change from call to call and must not cause recompilation.
NOT_SPECIALIZED = [
    *(f"stride_{tensor}_{dim}" for tensor in ("q", "k", "v") for dim in ("batch", "row", "head")),
    *("stride_out_row", "stride_grad_row", "queries", "keys", "heads", "reach", "threshold", "i_map"),
]


@triton.jit
def _step(b_out, b_max, b_sum, b_q, head, i_row, i_column, BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr):
    """Process one more tile of keys: update the weighted values, and the running maximum and sum."""
    if head.p_seed is not None:
        b_keep = dropout_keep(head, i_row, i_column, BM, BN, False)
    # [BM, BN]
    _, b_s = load_keys_and_score(b_q, head, i_row, i_column, BM, BN, CHECK)
    # [BM]
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # With a mask, a row may not have attended any key yet.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if head.p_mask is not None else b_new
    b_p = tl.math.exp2(b_s - b_shift[:, None])
    b_decay = tl.math.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    if head.p_seed is not None:
        b_p = tl.where(b_keep, b_p, 0.0)
    b_out = scale_rows(b_out, b_decay[:, None])
    b_v = load_values(head, i_column, BN, CHECK)
    b_out = add_weighted(b_out, b_p, b_v, head)
    return b_out, b_new, b_sum


@triton.jit
def _rows(p_out, p_lse, stride_out, head, i_row, BM: tl.constexpr, BN: tl.constexpr, COLUMN_TAIL: tl.constexpr):
    """Compute BM queries from i_row on."""
    i_position = head.offset + i_row
    o_row = i_row + tl.arange(0, BM)
    m_row = o_row < head.queries
    b_q = load_rows(head.p_q, head.stride_q, i_row, m_row, head, BM)
    b_out = zero_rows(head, BM)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    plain = (i_position + 1) // BN if head.CAUSAL else tl.maximum(tl.cdiv(head.keys, BN) - 1, 0)
    if COLUMN_TAIL > 0:
        b_out, b_max, b_sum = _step(b_out, b_max, b_sum, b_q, head, i_row, plain * BN, BM, COLUMN_TAIL, True)
    for i_n in range(0, plain):
        b_out, b_max, b_sum = _step(b_out, b_max, b_sum, b_q, head, i_row, i_n * BN, BM, BN, False)
    if head.CAUSAL:
        for i_n in range(plain, tl.cdiv(tl.minimum(head.keys, i_position + BM), BN)):
            b_out, b_max, b_sum = _step(b_out, b_max, b_sum, b_q, head, i_row, i_n * BN, BM, BN, True)

    # A row without keys gives zeros, and zero weights in backward.
    m_any = b_sum > 0.0
    b_sum = tl.where(m_any, b_sum, 1.0)
    b_factor = tl.where(m_any, head.rescale / b_sum, 0.0)
    store_rows(p_out, stride_out, i_row, scale_rows(b_out, b_factor[:, None]), m_row, head, BM)
    if p_lse is not None:
        b_lse = tl.where(m_any, b_max + tl.math.log2(b_sum), float("inf"))
        tl.store(p_lse + o_row, b_lse, mask=m_row)


@triton.jit
def _tile(
    head, p_out, p_lse, stride_out, i_m,
    BM: tl.constexpr, BN: tl.constexpr, ROW_TAIL: tl.constexpr, COLUMN_TAIL: tl.constexpr,
):  # fmt: skip
    if ROW_TAIL == 0 or i_m < tl.cdiv(head.queries, BM) - 1:
        _rows(p_out, p_lse, stride_out, head, i_m * BM, BM, BN, COLUMN_TAIL)
    else:
        _rows(p_out, p_lse, stride_out, head, i_m * BM, ROW_TAIL, BN, COLUMN_TAIL)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_forward(
    p_q,  # [B, L, H, Dh]
    p_k,  # [B, M, H, Dh]
    p_v,  # [B, M, H, Dh]
    p_mask,  # [B, M] bytes, or None
    p_bias,  # [H, 2 * reach + 1], or None
    p_seed,  # int64 [], or None
    p_out,  # [B, L, *, H, Dh], rows stride_out_row apart
    p_lse,  # [B, H, L], or None
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_out_row,
    queries,
    keys,
    heads,
    reach,
    i_map,
    scale,
    threshold,
    rescale,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    COLUMN_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of queries of one head."""
    tiles = tl.cdiv(queries, BM)
    i_m = tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    located = locate(
        p_q, p_k, p_v, stride_q_batch, stride_q_row, stride_q_head, stride_k_batch, stride_k_row, stride_k_head,
        stride_v_batch, stride_v_row, stride_v_head, i_b, i_h, UNIT,
    )  # fmt: skip
    stride_out = stride_out_row.to(tl.int64) * 8
    p_out += i_b * queries * stride_out + i_h * HEAD_DIM
    if p_lse is not None:
        p_lse += i_bh.to(tl.int64) * queries
    _tile(
        Head(
            *located, None if p_mask is None else p_mask + i_b * keys,
            None if p_bias is None else p_bias + i_h * (2 * reach + 1), queries, keys, keys - queries, reach, scale,
            i_bh, i_map, p_seed, threshold, rescale, HEAD_DIM, D1, D2, CAUSAL, PRECISION,
        ),
        p_out, p_lse, stride_out, i_m, BM, BN, ROW_TAIL, COLUMN_TAIL,
    )  # fmt: skip
