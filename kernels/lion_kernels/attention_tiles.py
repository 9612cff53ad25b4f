"""Attention tile by tile, without a matrix of scores in memory: the kernels of the attention operators.

Forward, for a tile of queries, over tiles of keys (FlashAttention, Dao et al., arXiv 2205.14135 and 2307.08691):

    s = scale q k^T + bias[key position - query position]        the softmax runs in base 2: exp(s) = 2^(s log2 e)
    out = sum_j r_j p_j v_j,   p = exp(s - lse),   lse = log sum exp s,   r = 0 or 1 / (1 - dropout_p)

Backward from lse, the output and its gradient g (out is weighed by `gate` afterwards, or gate = 1):

    delta = rowsum(g * out)                                      also the gate's gradient, summed over rows
    ds = p * (r * g v^T - delta)
    dq = gate * scale * ds k,   dk = gate * scale * ds^T q,   dv = gate * (r * p)^T g

dq comes from one kernel and dk, dv from another: every sum has one owner and one order, and no atomics.

A head dimension is at most two pieces, powers of two: 88 = 64 + 32 pads 8 columns where 128 would pad 40. A length
slightly above a multiple of the tile gets a narrow last tile: 257 = 4 * 64 + 16, of which 15 are masked.
"""

# A kernel's constexpr arguments take plain values, and a launch has keywords of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from typing import Any

import torch
from torch import Tensor

from lion_kernels.aot import KernelSpec
from lion_kernels.backend import LAUNCH, dot_precision, on_device, tl, triton
from lion_kernels.configs import lookup

NARROW = 16  # the least rows or columns that a matrix product takes

_NOT_SPECIALIZED = [
    *(f"stride_{tensor}_{dim}" for tensor in ("q", "k", "v") for dim in ("batch", "row", "head")),
    *("stride_out_row", "stride_grad_row", "queries", "keys", "heads", "reach", "seed", "threshold", "i_map"),
]


@triton.jit
def _piece(p_x, stride, m_row, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of ROWS rows from p_x on; zeros past HEAD_DIM and where m_row (unless None)."""
    o_d = FIRST + tl.arange(0, WIDTH)
    # [ROWS, WIDTH]
    p_tile = p_x + tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + o_d[None, :]
    if m_row is None and HEAD_DIM >= FIRST + WIDTH:
        return tl.load(p_tile)
    elif m_row is None:
        return tl.load(p_tile, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM >= FIRST + WIDTH:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_rows(p_x, stride, m_row, ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Both pieces of ROWS rows; the second stands for nothing where D2 is 0."""
    b_1 = _piece(p_x, stride, m_row, ROWS, 0, D1, HEAD_DIM)
    b_2 = _piece(p_x, stride, m_row, ROWS, D1, D2, HEAD_DIM) if D2 > 0 else b_1
    return b_1, b_2


@triton.jit
def _store_piece(
    p_x, stride, b_x, m_row, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    o_d = FIRST + tl.arange(0, WIDTH)
    p_tile = p_x + tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def _store(
    p_x, stride, b_1, b_2, m_row, ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HEAD_DIM: tl.constexpr
):
    _store_piece(p_x, stride, b_1, m_row, ROWS, 0, D1, HEAD_DIM)
    if D2 > 0:
        _store_piece(p_x, stride, b_2, m_row, ROWS, D1, D2, HEAD_DIM)


@triton.jit
def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Two accumulators; the second is a stand-in that nothing changes where D2 is 0."""
    b_1 = tl.zeros([ROWS, D1], tl.float32)
    b_2 = tl.zeros([ROWS, D2 if D2 > 0 else 1], tl.float32)
    return b_1, b_2


@triton.jit
def inner_product(b_a1, b_a2, b_b1, b_b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, summed over both pieces."""
    b_out = tl.dot(b_a1, tl.trans(b_b1), input_precision=PRECISION)
    if D2 > 0:
        b_out = tl.dot(b_a2, tl.trans(b_b2), b_out, input_precision=PRECISION)
    return b_out


@triton.jit
def _outer(b_acc1, b_acc2, b_weights, b_1, b_2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights x, piece by piece."""
    b_weights = b_weights.to(b_1.dtype)
    b_acc1 = tl.dot(b_weights, b_1, b_acc1, input_precision=PRECISION)
    if D2 > 0:
        b_acc2 = tl.dot(b_weights, b_2, b_acc2, input_precision=PRECISION)
    return b_acc1, b_acc2


@triton.jit
def _bias(
    p_bias, reach, i_position, i_column, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):  # [BM, BN], transposed [BN, BM]
    """The bias, by distance, of BM queries from i_position on and BN keys from i_column on.

    p_bias holds the distances -reach .. reach of one head; beyond, the bias stays what it is there.
    """
    b_bias = tl.zeros([BN, BM], tl.float32) if TRANSPOSED else tl.zeros([BM, BN], tl.float32)
    if i_column - (i_position + BM - 1) >= reach:
        b_bias += tl.load(p_bias + 2 * reach).to(tl.float32)
    elif i_position - (i_column + BN - 1) >= reach:
        b_bias += tl.load(p_bias).to(tl.float32)
    else:
        o_position = i_position + tl.arange(0, BM)
        o_column = i_column + tl.arange(0, BN)
        o_distance = o_column[:, None] - o_position[None, :] if TRANSPOSED else o_column[None, :] - o_position[:, None]
        o_distance = tl.minimum(tl.maximum(o_distance, -reach), reach) + reach
        b_bias += tl.load(p_bias + o_distance).to(tl.float32)
    return b_bias


@triton.jit
def dropout_keep(
    seed, threshold, i_bh, i_map, i_row, i_column, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):  # [BM, BN], transposed [BN, BM]
    """Which probabilities dropout keeps; `dropout_mask` says how.  i_column is a multiple of 4."""
    GROUPS: tl.constexpr = BN // 4
    o_group = i_column // 4 + tl.arange(0, GROUPS)
    o_row = i_row + tl.arange(0, BM)
    if TRANSPOSED:
        b_zero = tl.zeros([GROUPS, BM], tl.int32)
        b_group, b_row = b_zero + o_group[:, None], b_zero + o_row[None, :]
    else:
        b_zero = tl.zeros([BM, GROUPS], tl.int32)
        b_group, b_row = b_zero + o_group[None, :], b_zero + o_row[:, None]
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_group, b_row, b_zero + i_bh, b_zero + i_map)
    # A byte each, because that is what changing the layout then moves.
    b_0 = ((b_0 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_1 = ((b_1 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_2 = ((b_2 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_3 = ((b_3 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_keep = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    b_keep = tl.reshape(tl.permute(b_keep, (0, 2, 3, 1)), [BN, BM]) if TRANSPOSED else tl.reshape(b_keep, [BM, BN])
    return b_keep != 0


@triton.jit
def attention_scores(
    b_q1,
    b_q2,
    b_k1,
    b_k2,
    p_mask,
    p_bias,
    reach,
    i_position,
    i_column,
    keys,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D2: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2(e) times the scores [BM, BN]; -inf where a key may not be attended or, with CHECK, does not exist."""
    LOG2E = 1.4426950408889634
    o_column = i_column + tl.arange(0, BN)
    b_s = inner_product(b_q1, b_q2, b_k1, b_k2, D2, PRECISION) * (scale * LOG2E)
    if p_bias is not None:
        b_s += _bias(p_bias, reach, i_position, i_column, BM, BN, False) * LOG2E
    if CHECK and CAUSAL:
        o_position = i_position + tl.arange(0, BM)
        m_s = (o_column < keys)[None, :] & (o_column[None, :] <= o_position[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
    elif CHECK:
        b_s = tl.where((o_column < keys)[None, :], b_s, float("-inf"))
    if p_mask is not None:
        m_attended = tl.load(p_mask + o_column, mask=o_column < keys, other=0) != 0
        b_s = tl.where(m_attended[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def _forward_step(
    b_acc1,
    b_acc2,
    b_max,
    b_sum,
    b_q1,
    b_q2,
    p_k,
    p_v,
    stride_k,
    stride_v,
    p_mask,
    p_bias,
    reach,
    i_row,
    i_position,
    i_column,
    i_bh,
    i_map,
    keys,
    scale,
    seed,
    threshold,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHECK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys more: the running maximum, sum and weighted values."""
    i_first = tl.cast(i_column, tl.int64)
    m_column = (i_column + tl.arange(0, BN) < keys) if CHECK else None
    b_k1, b_k2 = load_rows(p_k + i_first * stride_k, stride_k, m_column, BN, D1, D2, HEAD_DIM)
    if DROPOUT:
        b_keep = dropout_keep(seed, threshold, i_bh, i_map, i_row, i_column, BM, BN, False)
    b_s = attention_scores(
        b_q1, b_q2, b_k1, b_k2, p_mask, p_bias, reach, i_position, i_column, keys, scale, BM, BN, D2, CAUSAL, CHECK,
        PRECISION,
    )  # fmt: skip
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # With a mask a row may have met no key yet.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if p_mask is not None else b_new
    b_p = tl.math.exp2(b_s - b_shift[:, None])
    b_decay = tl.math.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    if DROPOUT:
        b_p = tl.where(b_keep, b_p, 0.0)
    b_acc1 *= b_decay[:, None]
    if D2 > 0:
        b_acc2 *= b_decay[:, None]
    b_v1, b_v2 = load_rows(p_v + i_first * stride_v, stride_v, m_column, BN, D1, D2, HEAD_DIM)
    b_acc1, b_acc2 = _outer(b_acc1, b_acc2, b_p, b_v1, b_v2, D2, PRECISION)
    return b_acc1, b_acc2, b_new, b_sum


@triton.jit
def _forward_rows(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_bias,
    p_out,
    p_lse,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    reach,
    i_row,
    i_bh,
    i_map,
    queries,
    keys,
    scale,
    seed,
    threshold,
    rescale,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    COLUMN_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM queries from i_row on. Pointers are those of the batch element and head."""
    i_first = i_row.to(tl.int64)
    i_position = keys - queries + i_row
    o_row = i_row + tl.arange(0, BM)
    m_row = o_row < queries
    b_q1, b_q2 = load_rows(p_q + i_first * stride_q, stride_q, m_row, BM, D1, D2, HEAD_DIM)
    b_acc1, b_acc2 = _zeros(BM, D1, D2)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    plain = (i_position + 1) // BN if CAUSAL else keys // BN
    for i_n in range(0, plain):
        b_acc1, b_acc2, b_max, b_sum = _forward_step(
            b_acc1, b_acc2, b_max, b_sum, b_q1, b_q2, p_k, p_v, stride_k, stride_v, p_mask, p_bias, reach, i_row,
            i_position, i_n * BN, i_bh, i_map, keys, scale, seed, threshold, HEAD_DIM, D1, D2, BM, BN, CAUSAL, False,
            DROPOUT, PRECISION,
        )  # fmt: skip
    if CAUSAL:
        for i_n in range(plain, tl.cdiv(tl.minimum(keys, i_position + BM), BN)):
            b_acc1, b_acc2, b_max, b_sum = _forward_step(
                b_acc1, b_acc2, b_max, b_sum, b_q1, b_q2, p_k, p_v, stride_k, stride_v, p_mask, p_bias, reach, i_row,
                i_position, i_n * BN, i_bh, i_map, keys, scale, seed, threshold, HEAD_DIM, D1, D2, BM, BN, CAUSAL,
                True, DROPOUT, PRECISION,
            )  # fmt: skip
    elif COLUMN_TAIL > 0:
        b_acc1, b_acc2, b_max, b_sum = _forward_step(
            b_acc1, b_acc2, b_max, b_sum, b_q1, b_q2, p_k, p_v, stride_k, stride_v, p_mask, p_bias, reach, i_row,
            i_position, plain * BN, i_bh, i_map, keys, scale, seed, threshold, HEAD_DIM, D1, D2, BM, COLUMN_TAIL,
            CAUSAL, True, DROPOUT, PRECISION,
        )  # fmt: skip

    # A row that attended nothing gives zeros, and weights of zero in backward.
    m_any = b_sum > 0.0
    b_sum = tl.where(m_any, b_sum, 1.0)
    b_factor = tl.where(m_any, rescale / b_sum, 0.0)[:, None]
    _store(p_out + i_first * stride_out, stride_out, b_acc1 * b_factor, b_acc2 * b_factor, m_row, BM, D1, D2, HEAD_DIM)
    if p_lse is not None:
        b_lse = tl.where(m_any, b_max + tl.math.log2(b_sum), float("inf"))
        tl.store(p_lse + o_row, b_lse, mask=m_row)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_forward(
    p_q,  # [B, L, H, Dh]
    p_k,  # [B, M, H, Dh]
    p_v,  # [B, M, H, Dh]
    p_mask,  # [B, M] bytes, or None
    p_bias,  # [H, 2 * reach + 1], or None
    p_out,  # [B, L, *, H, Dh], a row is stride_out_row apart from the next
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
    seed,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head; strides come in units of UNIT values, so that 16-byte loads are seen legal."""
    tiles = tl.cdiv(queries, BM)
    i_m = tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    p_q += (i_b * stride_q_batch + i_h * stride_q_head) * UNIT
    p_k += (i_b * stride_k_batch + i_h * stride_k_head) * UNIT
    p_v += (i_b * stride_v_batch + i_h * stride_v_head) * UNIT
    stride_q = stride_q_row.to(tl.int64) * UNIT
    stride_k = stride_k_row.to(tl.int64) * UNIT
    stride_v = stride_v_row.to(tl.int64) * UNIT
    stride_out = stride_out_row.to(tl.int64) * 8
    p_out += i_b * queries * stride_out + i_h * HEAD_DIM
    if p_mask is not None:
        p_mask += i_b * keys
    if p_bias is not None:
        p_bias += i_h * (2 * reach + 1)
    if p_lse is not None:
        p_lse += i_bh.to(tl.int64) * queries
    if ROW_TAIL == 0 or i_m < tiles - 1:
        _forward_rows(
            p_q, p_k, p_v, p_mask, p_bias, p_out, p_lse, stride_q, stride_k, stride_v, stride_out, reach, i_m * BM,
            i_bh, i_map, queries, keys, scale, seed, threshold, rescale, HEAD_DIM, D1, D2, BM, BN, COLUMN_TAIL, CAUSAL,
            DROPOUT, PRECISION,
        )  # fmt: skip
    else:
        _forward_rows(
            p_q, p_k, p_v, p_mask, p_bias, p_out, p_lse, stride_q, stride_k, stride_v, stride_out, reach, i_m * BM,
            i_bh, i_map, queries, keys, scale, seed, threshold, rescale, HEAD_DIM, D1, D2, ROW_TAIL, BN, COLUMN_TAIL,
            CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit
def _query_step(
    b_dq1,
    b_dq2,
    b_q1,
    b_q2,
    b_g1,
    b_g2,
    b_lse,
    b_delta,
    p_k,
    p_v,
    stride_k,
    stride_v,
    p_mask,
    p_bias,
    reach,
    i_row,
    i_position,
    i_column,
    i_bh,
    i_map,
    keys,
    scale,
    seed,
    threshold,
    rescale,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHECK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys more in ds k."""
    i_first = tl.cast(i_column, tl.int64)
    m_column = (i_column + tl.arange(0, BN) < keys) if CHECK else None
    b_k1, b_k2 = load_rows(p_k + i_first * stride_k, stride_k, m_column, BN, D1, D2, HEAD_DIM)
    if DROPOUT:
        b_keep = dropout_keep(seed, threshold, i_bh, i_map, i_row, i_column, BM, BN, False)
    b_s = attention_scores(
        b_q1, b_q2, b_k1, b_k2, p_mask, p_bias, reach, i_position, i_column, keys, scale, BM, BN, D2, CAUSAL, CHECK,
        PRECISION,
    )  # fmt: skip
    b_p = tl.math.exp2(b_s - b_lse[:, None])
    b_v1, b_v2 = load_rows(p_v + i_first * stride_v, stride_v, m_column, BN, D1, D2, HEAD_DIM)
    b_dp = inner_product(b_g1, b_g2, b_v1, b_v2, D2, PRECISION)
    if DROPOUT:
        b_dp = tl.where(b_keep, b_dp * rescale, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return _outer(b_dq1, b_dq2, b_ds, b_k1, b_k2, D2, PRECISION)


@triton.jit
def _query_rows(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_bias,
    p_gate,
    p_out,
    p_grad,
    p_lse,
    p_delta,
    p_previous,
    p_dq,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    stride_grad,
    stride_dq,
    reach,
    i_row,
    i_bh,
    i_map,
    queries,
    keys,
    scale,
    seed,
    threshold,
    rescale,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    COLUMN_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta and dq of BM queries from i_row on. Pointers are those of the batch element and head."""
    i_first = i_row.to(tl.int64)
    i_position = keys - queries + i_row
    o_row = i_row + tl.arange(0, BM)
    m_row = o_row < queries
    b_g1, b_g2 = load_rows(p_grad + i_first * stride_grad, stride_grad, m_row, BM, D1, D2, HEAD_DIM)
    b_o1, b_o2 = load_rows(p_out + i_first * stride_out, stride_out, m_row, BM, D1, D2, HEAD_DIM)
    b_delta = tl.sum(b_g1.to(tl.float32) * b_o1.to(tl.float32), 1)
    if D2 > 0:
        b_delta += tl.sum(b_g2.to(tl.float32) * b_o2.to(tl.float32), 1)
    tl.store(p_delta + o_row, b_delta, mask=m_row)
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
    b_q1, b_q2 = load_rows(p_q + i_first * stride_q, stride_q, m_row, BM, D1, D2, HEAD_DIM)
    b_dq1, b_dq2 = _zeros(BM, D1, D2)

    plain = (i_position + 1) // BN if CAUSAL else keys // BN
    for i_n in range(0, plain):
        b_dq1, b_dq2 = _query_step(
            b_dq1, b_dq2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, p_k, p_v, stride_k, stride_v, p_mask, p_bias, reach,
            i_row, i_position, i_n * BN, i_bh, i_map, keys, scale, seed, threshold, rescale, HEAD_DIM, D1, D2, BM, BN,
            CAUSAL, False, DROPOUT, PRECISION,
        )  # fmt: skip
    if CAUSAL:
        for i_n in range(plain, tl.cdiv(tl.minimum(keys, i_position + BM), BN)):
            b_dq1, b_dq2 = _query_step(
                b_dq1, b_dq2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, p_k, p_v, stride_k, stride_v, p_mask, p_bias,
                reach, i_row, i_position, i_n * BN, i_bh, i_map, keys, scale, seed, threshold, rescale, HEAD_DIM, D1,
                D2, BM, BN, CAUSAL, True, DROPOUT, PRECISION,
            )  # fmt: skip
    elif COLUMN_TAIL > 0:
        b_dq1, b_dq2 = _query_step(
            b_dq1, b_dq2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, p_k, p_v, stride_k, stride_v, p_mask, p_bias, reach,
            i_row, i_position, plain * BN, i_bh, i_map, keys, scale, seed, threshold, rescale, HEAD_DIM, D1, D2, BM,
            COLUMN_TAIL, CAUSAL, True, DROPOUT, PRECISION,
        )  # fmt: skip

    factor = scale * tl.load(p_gate + i_map).to(tl.float32) if p_gate is not None else scale
    b_dq1 *= factor
    b_dq2 *= factor
    if p_previous is not None:
        b_1, b_2 = load_rows(p_previous + i_first * stride_dq, stride_dq, m_row, BM, D1, D2, HEAD_DIM)
        b_dq1 += b_1
        if D2 > 0:
            b_dq2 += b_2
    _store(p_dq + i_first * stride_dq, stride_dq, b_dq1, b_dq2, m_row, BM, D1, D2, HEAD_DIM)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_backward_queries(
    p_q,  # [B, L, H, Dh]
    p_k,  # [B, M, H, Dh]
    p_v,  # [B, M, H, Dh]
    p_mask,  # [B, M] bytes, or None
    p_bias,  # [H, 2 * reach + 1], or None
    p_gate,  # [S], or None
    p_out,  # [B, L, *, H, Dh], a row is stride_out_row apart from the next
    p_grad,  # [B, L, *, H, Dh], a row is stride_grad_row apart from the next
    p_lse,  # [B, H, L]
    p_delta,  # [B, H, L]
    p_previous,  # [B, L, H, Dh], the sum over the maps before, or None
    p_dq,  # [B, L, H, Dh]
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
    stride_grad_row,
    queries,
    keys,
    heads,
    reach,
    i_map,
    scale,
    seed,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta and the queries' gradient, for one tile of queries of one head."""
    tiles = tl.cdiv(queries, BM)
    i_m = tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    p_q += (i_b * stride_q_batch + i_h * stride_q_head) * UNIT
    p_k += (i_b * stride_k_batch + i_h * stride_k_head) * UNIT
    p_v += (i_b * stride_v_batch + i_h * stride_v_head) * UNIT
    stride_q = stride_q_row.to(tl.int64) * UNIT
    stride_k = stride_k_row.to(tl.int64) * UNIT
    stride_v = stride_v_row.to(tl.int64) * UNIT
    stride_out = stride_out_row.to(tl.int64) * 8
    stride_grad = stride_grad_row.to(tl.int64) * 8
    stride_dq = heads.to(tl.int64) * HEAD_DIM
    p_out += i_b * queries * stride_out + i_h * HEAD_DIM
    p_grad += i_b * queries * stride_grad + i_h * HEAD_DIM
    p_dq += i_b * queries * stride_dq + i_h * HEAD_DIM
    p_lse += i_bh.to(tl.int64) * queries
    p_delta += i_bh.to(tl.int64) * queries
    if p_mask is not None:
        p_mask += i_b * keys
    if p_bias is not None:
        p_bias += i_h * (2 * reach + 1)
    if p_previous is not None:
        p_previous += i_b * queries * stride_dq + i_h * HEAD_DIM
    if ROW_TAIL == 0 or i_m < tiles - 1:
        _query_rows(
            p_q, p_k, p_v, p_mask, p_bias, p_gate, p_out, p_grad, p_lse, p_delta, p_previous, p_dq, stride_q, stride_k,
            stride_v, stride_out, stride_grad, stride_dq, reach, i_m * BM, i_bh, i_map, queries, keys, scale, seed,
            threshold, rescale, HEAD_DIM, D1, D2, BM, BN, COLUMN_TAIL, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
    else:
        _query_rows(
            p_q, p_k, p_v, p_mask, p_bias, p_gate, p_out, p_grad, p_lse, p_delta, p_previous, p_dq, stride_q, stride_k,
            stride_v, stride_out, stride_grad, stride_dq, reach, i_m * BM, i_bh, i_map, queries, keys, scale, seed,
            threshold, rescale, HEAD_DIM, D1, D2, ROW_TAIL, BN, COLUMN_TAIL, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit
def _key_step(
    b_dk1,
    b_dk2,
    b_dv1,
    b_dv2,
    b_k1,
    b_k2,
    b_v1,
    b_v2,
    m_key,
    p_q,
    p_grad,
    p_lse,
    p_delta,
    stride_q,
    stride_grad,
    p_bias,
    reach,
    i_row,
    i_column,
    i_bh,
    i_map,
    queries,
    keys,
    scale,
    seed,
    threshold,
    rescale,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHECK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries more in ds^T q and (r p)^T g. Scores are transposed here: they are the left factors."""
    LOG2E = 1.4426950408889634
    i_first = tl.cast(i_row, tl.int64)
    o_row = i_row + tl.arange(0, BM)
    i_position = keys - queries + i_row
    if CHECK:
        m_row = o_row < queries
        b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
        b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
    else:
        m_row = None
        b_lse = tl.load(p_lse + o_row)
        b_delta = tl.load(p_delta + o_row)
    b_q1, b_q2 = load_rows(p_q + i_first * stride_q, stride_q, m_row, BM, D1, D2, HEAD_DIM)
    if DROPOUT:
        b_keep = dropout_keep(seed, threshold, i_bh, i_map, i_row, i_column, BM, BN, True)
    # [BN, BM]
    b_s = inner_product(b_k1, b_k2, b_q1, b_q2, D2, PRECISION) * (scale * LOG2E)
    if p_bias is not None:
        b_s += _bias(p_bias, reach, i_position, i_column, BM, BN, True) * LOG2E
    if CHECK and CAUSAL:
        o_column = i_column + tl.arange(0, BN)
        o_position = i_position + tl.arange(0, BM)
        b_s = tl.where(o_column[:, None] <= o_position[None, :], b_s, float("-inf"))
    if m_key is not None:
        b_s = tl.where(m_key[:, None], b_s, float("-inf"))
    b_p = tl.math.exp2(b_s - b_lse[None, :])
    b_g1, b_g2 = load_rows(p_grad + i_first * stride_grad, stride_grad, m_row, BM, D1, D2, HEAD_DIM)
    b_dp = inner_product(b_v1, b_v2, b_g1, b_g2, D2, PRECISION)
    if DROPOUT:
        b_dp = tl.where(b_keep, b_dp * rescale, 0.0)
        b_weights = tl.where(b_keep, b_p, 0.0)
    else:
        b_weights = b_p
    b_dv1, b_dv2 = _outer(b_dv1, b_dv2, b_weights, b_g1, b_g2, D2, PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk1, b_dk2 = _outer(b_dk1, b_dk2, b_ds, b_q1, b_q2, D2, PRECISION)
    return b_dk1, b_dk2, b_dv1, b_dv2


@triton.jit
def _key_rows(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_bias,
    p_gate,
    p_grad,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    stride_q,
    stride_k,
    stride_v,
    stride_grad,
    stride_dk,
    reach,
    i_column,
    i_bh,
    i_map,
    queries,
    keys,
    scale,
    seed,
    threshold,
    rescale,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BN keys from i_column on. Pointers are those of the batch element and head."""
    i_first = i_column.to(tl.int64)
    o_column = i_column + tl.arange(0, BN)
    m_column = o_column < keys
    m_key = None
    if p_mask is not None:
        m_key = tl.load(p_mask + o_column, mask=m_column, other=0) != 0
    b_k1, b_k2 = load_rows(p_k + i_first * stride_k, stride_k, m_column, BN, D1, D2, HEAD_DIM)
    b_v1, b_v2 = load_rows(p_v + i_first * stride_v, stride_v, m_column, BN, D1, D2, HEAD_DIM)
    b_dk1, b_dk2 = _zeros(BN, D1, D2)
    b_dv1, b_dv2 = _zeros(BN, D1, D2)

    first = 0
    plain = queries // BM
    if CAUSAL:
        # The first query that attends the first key, and the first that attends the last one.
        begin = tl.maximum(i_column - (keys - queries), 0) // BM
        first = tl.minimum(tl.cdiv(tl.maximum(i_column + BN - 1 - (keys - queries), 0), BM), plain)
        for i_m in range(begin, first):
            b_dk1, b_dk2, b_dv1, b_dv2 = _key_step(
                b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, m_key, p_q, p_grad, p_lse, p_delta, stride_q,
                stride_grad, p_bias, reach, i_m * BM, i_column, i_bh, i_map, queries, keys, scale, seed, threshold,
                rescale, HEAD_DIM, D1, D2, BM, BN, CAUSAL, True, DROPOUT, PRECISION,
            )  # fmt: skip
    for i_m in range(first, plain):
        b_dk1, b_dk2, b_dv1, b_dv2 = _key_step(
            b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, m_key, p_q, p_grad, p_lse, p_delta, stride_q,
            stride_grad, p_bias, reach, i_m * BM, i_column, i_bh, i_map, queries, keys, scale, seed, threshold,
            rescale, HEAD_DIM, D1, D2, BM, BN, CAUSAL, False, DROPOUT, PRECISION,
        )  # fmt: skip
    if ROW_TAIL > 0:
        b_dk1, b_dk2, b_dv1, b_dv2 = _key_step(
            b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, m_key, p_q, p_grad, p_lse, p_delta, stride_q,
            stride_grad, p_bias, reach, plain * BM, i_column, i_bh, i_map, queries, keys, scale, seed, threshold,
            rescale, HEAD_DIM, D1, D2, ROW_TAIL, BN, CAUSAL, True, DROPOUT, PRECISION,
        )  # fmt: skip

    gate = tl.load(p_gate + i_map).to(tl.float32) if p_gate is not None else 1.0
    b_dk1 *= scale * gate
    b_dk2 *= scale * gate
    b_dv1 *= rescale * gate
    b_dv2 *= rescale * gate
    _store(p_dk + i_first * stride_dk, stride_dk, b_dk1, b_dk2, m_column, BN, D1, D2, HEAD_DIM)
    _store(p_dv + i_first * stride_dk, stride_dk, b_dv1, b_dv2, m_column, BN, D1, D2, HEAD_DIM)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_backward_keys(
    p_q,  # [B, L, H, Dh]
    p_k,  # [B, M, H, Dh]
    p_v,  # [B, M, H, Dh]
    p_mask,  # [B, M] bytes, or None
    p_bias,  # [H, 2 * reach + 1], or None
    p_gate,  # [S], or None
    p_grad,  # [B, L, *, H, Dh], a row is stride_grad_row apart from the next
    p_lse,  # [B, H, L]
    p_delta,  # [B, H, L]
    p_dk,  # [B, M, H, Dh]
    p_dv,  # [B, M, H, Dh]
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_grad_row,
    queries,
    keys,
    heads,
    reach,
    i_map,
    scale,
    seed,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys' and values' gradients, for one tile of keys of one head.

    ROW_TAIL is the last tile's width wherever the queries are no multiple of BM, COLUMN_TAIL only where it is narrow.
    """
    tiles = tl.cdiv(keys, BN)
    i_n = tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    p_q += (i_b * stride_q_batch + i_h * stride_q_head) * UNIT
    p_k += (i_b * stride_k_batch + i_h * stride_k_head) * UNIT
    p_v += (i_b * stride_v_batch + i_h * stride_v_head) * UNIT
    stride_q = stride_q_row.to(tl.int64) * UNIT
    stride_k = stride_k_row.to(tl.int64) * UNIT
    stride_v = stride_v_row.to(tl.int64) * UNIT
    stride_grad = stride_grad_row.to(tl.int64) * 8
    stride_dk = heads.to(tl.int64) * HEAD_DIM
    p_grad += i_b * queries * stride_grad + i_h * HEAD_DIM
    p_dk += i_b * keys * stride_dk + i_h * HEAD_DIM
    p_dv += i_b * keys * stride_dk + i_h * HEAD_DIM
    p_lse += i_bh.to(tl.int64) * queries
    p_delta += i_bh.to(tl.int64) * queries
    if p_mask is not None:
        p_mask += i_b * keys
    if p_bias is not None:
        p_bias += i_h * (2 * reach + 1)
    if COLUMN_TAIL == 0 or i_n < tiles - 1:
        _key_rows(
            p_q, p_k, p_v, p_mask, p_bias, p_gate, p_grad, p_lse, p_delta, p_dk, p_dv, stride_q, stride_k, stride_v,
            stride_grad, stride_dk, reach, i_n * BN, i_bh, i_map, queries, keys, scale, seed, threshold, rescale,
            HEAD_DIM, D1, D2, BM, BN, ROW_TAIL, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
    else:
        _key_rows(
            p_q, p_k, p_v, p_mask, p_bias, p_gate, p_grad, p_lse, p_delta, p_dk, p_dv, stride_q, stride_k, stride_v,
            stride_grad, stride_dk, reach, i_n * BN, i_bh, i_map, queries, keys, scale, seed, threshold, rescale,
            HEAD_DIM, D1, D2, BM, COLUMN_TAIL, ROW_TAIL, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip


def supported(q: Tensor) -> bool:
    """Whether the kernels take q's dtype and head dimension."""
    return q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[-1] in range(8, 129, 8)


def check_supported(q: Tensor) -> None:
    """Raises ValueError for what only the "torch" backend takes."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q: expected float16, bfloat16 or float32 for backend 'triton', got {q.dtype}")
    if not supported(q):
        raise ValueError(f"q: expected Dh a multiple of 8 up to 128 for backend 'triton', got {list(q.shape)}")


def check_alike(q: Tensor, others: dict[str, Tensor]) -> None:
    """Raises ValueError for a tensor on another device, or outside autocast of another dtype, than q's."""
    check_device(q, dict(others))
    if autocast_dtype(q) is not None:
        return
    for name, x in others.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} (from q), got {x.dtype}")


def autocast_dtype(q: Tensor) -> torch.dtype | None:
    """What an active autocast casts the inputs to."""
    kind = q.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def check_device(q: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raises ValueError for a tensor on another device than q's."""
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} (from q), got {x.device}")


def split_head_dim(head_dim: int, kernel: str = "forward") -> tuple[int, int]:
    """At most two powers of two, none under 16, of the least sum that holds `head_dim`; one where it is no more.

    88 -> (64, 32), 64 -> (64, 0), 40 -> (32, 16), 128 -> (128, 0). In "backward_keys" 80 is (64, 32) too: there a piece
    of 16 beside one of 64 spills registers on sm_90, whatever the tile.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    if head_dim <= first or first < 16:
        return whole, 0
    least = 32 if kernel == "backward_keys" and first == 64 else 16
    second = max(least, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def tail(length: int, tile: int) -> int:
    """The width of the last tile of `length` in tiles of `tile`: 0 if it is a whole one, `NARROW` if that is enough."""
    rest = length % tile
    return 0 if rest == 0 else NARROW if rest <= NARROW else tile


def tile_sizes(kernel: str, q: Tensor, length: int, *, bias: bool, dropout: bool) -> dict[str, int]:
    """The tiles, warps and stages of a kernel ("forward", "backward_queries" or "backward_keys").

    Args:
        length: the queries, or in "backward_keys" the keys: what the programs share out.
    """
    width = sum(split_head_dim(q.shape[-1], kernel))
    rows = "few" if length <= 16 else "some" if length <= 64 else "many"
    features = f"{' bias' if bias else ''}{' dropout' if dropout else ''}"
    shape_class = f"{kernel} {8 * q.dtype.itemsize}-bit width={width} {rows}{features}"
    default = default_sizes(kernel, q.dtype, width, rows, bias=bias, dropout=dropout, compact=is_compact(q.device))
    return lookup("attention", shape_class, default)


def default_sizes(
    kernel: str, dtype: torch.dtype, width: int, rows: str, *, bias: bool, dropout: bool, compact: bool
) -> dict[str, int]:
    """Sizes for a GPU that nobody measured: the largest tiles that stay in registers on sm_90.

    A gathered bias and dropout's generator want registers of their own. `compact` ones fit 64 KiB of shared memory.
    """
    # A third stage frees the registers of what the second holds back.
    stages = 1 if compact else 3 if kernel == "backward_keys" and bias and dropout and width > 64 else 2
    wide = 8 if width > 64 else 4
    if dtype == torch.float32:
        tile = (32, 16, 8) if kernel == "backward_keys" else (16, 16 if compact else 32, 8)
    elif kernel == "backward_keys":
        tile = (32, 64, wide) if compact else _key_tile(width, rows, bias, dropout)
    elif rows == "few":
        tile = (16, 32 if compact or width > 96 else 64, 4)
    elif compact:
        tile = (64, 32, wide)
    elif rows == "some":
        tile = (64, 32 if dropout else 64, 8 if kernel == "backward_queries" or dropout else 4)
    else:
        narrow = width > 96 and dropout and (bias or kernel == "backward_queries")
        tile = (128, 32 if narrow else 64, 8)
    return {"BM": tile[0], "BN": tile[1], "num_warps": tile[2], "num_stages": stages}


def _key_tile(width: int, rows: str, bias: bool, dropout: bool) -> tuple[int, int, int]:
    """Queries, keys and warps of "backward_keys" in 16 bits, whose accumulators are two."""
    if rows == "few":
        return 64, 16, 4
    if bias:
        return (32 if width <= 64 else 16), 64, 8
    keys = 128 if rows == "many" and width <= 96 else 64
    return (32 if dropout else 64), keys, 8


def is_compact(device: torch.device) -> bool:
    """Whether a program has less shared memory on `device` than on data-center GPUs since the A100."""
    return device.type == "cuda" and _shared_memory(device) < 160 * 1024


@functools.cache
def _shared_memory(device: torch.device) -> int:
    # PyTorch tells for NVIDIA's; AMD's have 64 KiB, or more.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    reach: int = 0,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
    i_map: int = 0,
) -> None:
    """Writes attention to `out` and, unless it is None, the base-2 logarithm of every softmax's sum to `lse`.

    Args:
        q: [B, L, H, Dh], any strides with a contiguous last dimension.
        k, v: [B, M, H, Dh], likewise.
        out: [B, L, H, Dh], contiguous but for what may lie between two rows.
        lse: [B, H, L] in fp32.
        mask: [B, M] in bool, contiguous; which keys may be attended.
        bias: [H, 2 * reach + 1], contiguous; what is added to a score by distance.
        i_map: the map's number, which counts in its dropout.
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    features = {"bias": bias is not None, "dropout": dropout_p > 0.0}
    sizes = tile_sizes("forward", q, queries, **features)
    common = _common("forward", q, k, v, sizes, scale, mask, bias, reach, causal, dropout_p, seed, i_map)
    row_tail = tail(queries, sizes["BM"])
    with on_device(q):
        attention_forward[(triton.cdiv(queries, sizes["BM"]) * batch * heads,)](
            p_out=out,
            p_lse=lse,
            stride_out_row=out.stride(1) // 8,
            ROW_TAIL=row_tail if row_tail == NARROW and sizes["BM"] > NARROW else 0,
            COLUMN_TAIL=tail(keys, sizes["BN"]),
            **common,
        )


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    reach: int = 0,
    gate: Tensor | None = None,
    previous: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
    i_map: int = 0,
) -> None:
    """Writes `delta` [B, H, L] in fp32, and the gradients, contiguous: dq [B, L, H, Dh] (plus `previous`, which is like
    it), dk and dv [B, M, H, Dh]. `grad` is laid out as `out` may be; the rest is as `attend` had it."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    features = {"bias": bias is not None, "dropout": dropout_p > 0.0}
    sizes = tile_sizes("backward_queries", q, queries, **features)
    common = _common("backward_queries", q, k, v, sizes, scale, mask, bias, reach, causal, dropout_p, seed, i_map)
    row_tail = tail(queries, sizes["BM"])
    with on_device(q):
        attention_backward_queries[(triton.cdiv(queries, sizes["BM"]) * batch * heads,)](
            p_gate=gate,
            p_out=out,
            p_grad=grad,
            p_lse=lse,
            p_delta=delta,
            p_previous=previous,
            p_dq=dq,
            stride_out_row=out.stride(1) // 8,
            stride_grad_row=grad.stride(1) // 8,
            ROW_TAIL=row_tail if row_tail == NARROW and sizes["BM"] > NARROW else 0,
            COLUMN_TAIL=tail(keys, sizes["BN"]),
            **common,
        )
    sizes = tile_sizes("backward_keys", q, keys, **features)
    common = _common("backward_keys", q, k, v, sizes, scale, mask, bias, reach, causal, dropout_p, seed, i_map)
    column_tail = tail(keys, sizes["BN"])
    with on_device(q):
        attention_backward_keys[(triton.cdiv(keys, sizes["BN"]) * batch * heads,)](
            p_gate=gate,
            p_grad=grad,
            p_lse=lse,
            p_delta=delta,
            p_dk=dk,
            p_dv=dv,
            stride_grad_row=grad.stride(1) // 8,
            ROW_TAIL=tail(queries, sizes["BM"]),
            COLUMN_TAIL=column_tail if column_tail == NARROW and sizes["BN"] > NARROW else 0,
            **common,
        )


def _common(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: dict[str, int],
    scale: float,
    mask: Tensor | None,
    bias: Tensor | None,
    reach: int,
    causal: bool,
    dropout_p: float,
    seed: int,
    i_map: int,
) -> dict[str, Any]:
    """The arguments that all three kernels have."""
    unit = stride_unit(q, k, v)
    strides = {
        f"stride_{name}_{dim}": x.stride(i) // unit
        for name, x in (("q", q), ("k", k), ("v", v))
        for i, dim in enumerate(("batch", "row", "head"))
    }
    piece1, piece2 = split_head_dim(q.shape[-1], kernel)
    return {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_mask": None if mask is None else mask.view(torch.uint8),
        "p_bias": bias,
        **strides,
        "queries": q.shape[1],
        "keys": k.shape[1],
        "heads": q.shape[2],
        "reach": reach,
        "i_map": i_map,
        "scale": scale,
        "seed": seed,
        "threshold": dropout_threshold(dropout_p),
        "rescale": 1.0 / (1.0 - dropout_p),
        "HEAD_DIM": q.shape[-1],
        "D1": piece1,
        "D2": piece2,
        "UNIT": unit,
        "CAUSAL": causal,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": dot_precision(q.dtype),
        **sizes,
        **LAUNCH,
    }


def stride_unit(*tensors: Tensor) -> int:
    """The values in 16 bytes if every stride is a multiple of it, else 1.

    Triton sees whether an argument is a multiple of 16, not of 8: a head's stride of 88 fp16 values has to come as 11.
    """
    unit = 16 // tensors[0].dtype.itemsize
    return unit if all(stride % unit == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def draw_seed(seed: int | None, dropout_p: float) -> Tensor | None:
    """The seed of a call's dropout as a tensor on the CPU; drawn from torch's default generator where None is given."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**31 - 1, (), dtype=torch.int64, device="cpu")
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def dropout_threshold(dropout_p: float) -> int:
    """What the 24 random bits of a probability must reach for it to be kept."""
    return round(dropout_p * 2**24)


def dropout_mask(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dropout_p: float,
    seed: int | Tensor,
    *,
    map_index: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What the attention operators multiply their probabilities by: 0 or 1 / (1 - dropout_p), [B, H, L, M] in fp32.

    Key j of query i, head h, element b and map s is kept where the high 24 bits of word j % 4 of Philox4x32-10 (Salmon
    et al., SC 2011) with the key `seed` and the counter (j // 4, i, b * H + h, s) reach 2^24 * dropout_p.
    """

    def counter(values: Tensor, dim: int) -> Tensor:
        return values.to(torch.int64).view([-1 if i == dim else 1 for i in range(3)])

    words = _philox(
        seed,
        counter(torch.arange((keys + 3) // 4, device=device), 2),
        counter(torch.arange(queries, device=device), 1),
        counter(torch.arange(batch * heads, device=device), 0),
        torch.full((1, 1, 1), map_index, dtype=torch.int64, device=device),
    )
    bits = torch.stack([word >> 8 for word in words], -1)  # [B * H, L, M / 4, 4]
    keep = bits.flatten(-2)[..., :keys].unflatten(0, (batch, heads)) >= dropout_threshold(dropout_p)
    return keep.float() / (1.0 - dropout_p)


def _philox(seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """The four words of Philox4x32-10, in int64 because torch has no full arithmetic in uint32."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high_a, low_a = _product(c0, 0xD2511F53)
        high_b, low_b = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of x * factor, both under 2^32: int64 wraps, so the high word comes in two halves."""
    carry = (x & 0xFFFF) * factor
    upper = (x >> 16) * factor + (carry >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (carry & 0xFFFF)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, visible: Tensor | None, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The formula with its matrix of scores, in PyTorch: the output [B, L, H, Dh] and lse [B, H, L].

    Args:
        bias: added to the scores, broadcasting to [B, H, L, M].
        visible: bool, broadcasting likewise; which scores count.
        keep: [B, H, L, M] that multiplies the probabilities.
    """
    p, lse = _plain_probabilities(q, k, bias, visible, scale, None)
    weights = p if keep is None else p * keep.to(p.dtype)
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2).contiguous(), lse


def plain_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    keep: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v (contiguous), ds [B, H, L, M] and delta [B, H, L]."""
    p, _ = _plain_probabilities(q, k, bias, visible, scale, lse)
    g = grad.transpose(1, 2).to(p.dtype)
    delta = (g * out.transpose(1, 2)).sum(-1)
    dp = g @ v.transpose(1, 2).transpose(-1, -2).to(p.dtype)
    weights = p
    if keep is not None:
        dp, weights = dp * keep.to(p.dtype), p * keep.to(p.dtype)
    ds = p * (dp - delta.unsqueeze(-1))
    dq = scale * (ds @ k.transpose(1, 2).to(p.dtype))
    dk = scale * (ds.transpose(-1, -2) @ q.transpose(1, 2).to(p.dtype))
    dv = weights.transpose(-1, -2) @ g
    gradients = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dq, dk, dv))
    return *gradients, ds, delta  # type: ignore[return-value]


def _plain_probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, scale: float, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.transpose(1, 2).to(dtype) @ k.transpose(1, 2).transpose(-1, -2).to(dtype))
    if bias is not None:
        scores = scores + bias.to(dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if lse is None:
        lse = scores.logsumexp(-1)
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    return (scores - lse.unsqueeze(-1)).exp(), lse


def specs(
    operator: str,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rows: str = "many",
    mask: bool = False,
    bias: bool = False,
    gate: bool = False,
    causal: bool = False,
    dropout: bool = False,
    compact: bool = False,
) -> list[KernelSpec]:
    """The three kernels as `attend` and `attend_backward` launch them, for the ahead-of-time report."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    unused = {"p_mask": mask, "p_bias": bias, "p_gate": gate, "p_previous": gate}
    pointers = dict.fromkeys(("p_q", "p_k", "p_v", "p_out", "p_grad", "p_bias", "p_gate", "p_dk", "p_dv"), f"*{kind}")
    pointers |= {"p_mask": "*u8", **dict.fromkeys(("p_lse", "p_delta", "p_previous"), "*fp32")}
    pointers["p_dq"] = "*fp32" if gate else f"*{kind}"
    features = {"mask": mask, "bias": bias, "gate": gate, "causal": causal, "dropout": dropout, "compact": compact}
    suffix = "".join(f" {name}" for name, on in features.items() if on)
    kernels = {
        "forward": attention_forward,
        "backward_queries": attention_backward_queries,
        "backward_keys": attention_backward_keys,
    }
    out = []
    for kernel, function in kernels.items():
        piece1, piece2 = split_head_dim(head_dim, kernel)
        sizes = default_sizes(kernel, dtype, piece1 + piece2, rows, bias=bias, dropout=dropout, compact=compact)
        tile_m, tile_n = sizes["BM"], sizes["BN"]
        constexprs = {
            **{name: None for name, used in unused.items() if not used and name in function.arg_names},
            "HEAD_DIM": head_dim,
            "D1": piece1,
            "D2": piece2,
            "UNIT": 16 // dtype.itemsize,
            "BM": tile_m,
            "BN": tile_n,
            "ROW_TAIL": NARROW if tile_m > NARROW or kernel == "backward_keys" else 0,
            "COLUMN_TAIL": NARROW if tile_n > NARROW or kernel != "backward_keys" else 0,
            "CAUSAL": causal,
            "DROPOUT": dropout,
            "PRECISION": "ieee",
        }
        scalars = dict.fromkeys(("scale", "rescale"), "fp32")
        signature = {name: pointers.get(name, scalars.get(name, "i32")) for name in function.arg_names}
        out.append(
            KernelSpec(
                name=f"{operator} {kernel} {kind} Dh={head_dim} {rows} {tile_m}x{tile_n}{suffix}",
                kernel=function,
                signature=signature,
                constexprs=constexprs,
                num_warps=sizes["num_warps"],
                num_stages=sizes["num_stages"],
                # Warp groups multiply 64 rows at least, and nothing multiplies fp32 without rounding it.
                matrix=dtype != torch.float32 and (tile_n if kernel == "backward_keys" else tile_m) >= 64,
            )
        )
    return out
