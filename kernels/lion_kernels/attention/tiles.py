"""Tile operations of the attention kernels: rows, products, scores, and dropout's selection of probabilities.

The scores of BM queries and BN keys are a block [BM, BN], or TRANSPOSED [BN, BM]. They are scaled by log2(e), because
the softmax runs in base 2: exp(s) = 2^(s log2 e).

A head dimension has at most two pieces, powers of two: 88 = 64 + 32 pads 8 columns, where 128 would pad 40. Rows are a
tuple with one block per piece.
"""

# Kernels differ from the Python that ruff and pyright expect: no tuple unpacking, static ranges, blocks as tensors.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from typing import Any, NamedTuple

from lion_kernels.core.backend import tl, triton
from lion_kernels.core.dropout import keep_four


class Head(NamedTuple):
    """One head of one batch element, as every kernel reads it.

    Kernels construct it inside the call that uses it: bound to a variable, it would lose the constness of its
    constants.

    Attributes:
        p_q, p_k, p_v: pointers to [L, Dh], [M, Dh], [M, Dh], with rows stride_q, stride_k and stride_v apart.
        p_mask: bytes [M], nonzero where a key may be attended, or None.
        p_bias: [2 * reach + 1], or None; added to the scores by distance, which is clamped to -reach .. reach.
        offset: position of the first query; the first key's is 0.
        i_bh: index of the head in the batch.
        i_map: index of the feature map.
        p_seed, threshold, rescale: of dropout (`core.dropout`), with rescale = 1 / (1 - dropout_p); None without
            dropout.
        D1, D2: the pieces of HEAD_DIM; D2 is 0 if there is only one.
        CAUSAL: whether a query may attend only keys up to its own position.
    """

    p_q: Any
    p_k: Any
    p_v: Any
    stride_q: Any
    stride_k: Any
    stride_v: Any
    p_mask: Any
    p_bias: Any
    queries: Any
    keys: Any
    offset: Any
    reach: Any
    scale: Any
    i_bh: Any
    i_map: Any
    p_seed: Any
    threshold: Any
    rescale: Any
    HEAD_DIM: Any
    D1: Any
    D2: Any
    CAUSAL: Any
    PRECISION: Any


@triton.jit
def locate(
    p_q, p_k, p_v, stride_q_batch, stride_q_row, stride_q_head, stride_k_batch, stride_k_row, stride_k_head,
    stride_v_batch, stride_v_row, stride_v_head, i_b, i_h, UNIT: tl.constexpr,
):  # fmt: skip
    """Return the first six fields of a `Head`; strides come in units of UNIT values, to make 16-byte loads legal."""
    p_q += (i_b * stride_q_batch + i_h * stride_q_head) * UNIT
    p_k += (i_b * stride_k_batch + i_h * stride_k_head) * UNIT
    p_v += (i_b * stride_v_batch + i_h * stride_v_head) * UNIT
    stride_q = stride_q_row.to(tl.int64) * UNIT
    stride_k = stride_k_row.to(tl.int64) * UNIT
    stride_v = stride_v_row.to(tl.int64) * UNIT
    return p_q, p_k, p_v, stride_q, stride_k, stride_v


@triton.jit
def _load_piece(
    p_x, stride, m_row, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Load columns FIRST to FIRST + WIDTH of ROWS rows from p_x on; zeros past HEAD_DIM and where m_row is false."""
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
def load_rows(p_x, stride, i_first, m_row, head, ROWS: tl.constexpr):
    """Load ROWS rows from i_first on: [ROWS, D1] and, unless D2 is 0, [ROWS, D2]."""
    p_x += tl.cast(i_first, tl.int64) * stride
    b_rows = (_load_piece(p_x, stride, m_row, ROWS, 0, head.D1, head.HEAD_DIM),)
    if head.D2 > 0:
        b_rows = b_rows + (_load_piece(p_x, stride, m_row, ROWS, head.D1, head.D2, head.HEAD_DIM),)
    return b_rows


@triton.jit
def store_rows(p_x, stride, i_first, b_rows, m_row, head, ROWS: tl.constexpr):
    p_x += tl.cast(i_first, tl.int64) * stride
    for i in tl.static_range(len(b_rows)):
        o_d = i * head.D1 + tl.arange(0, b_rows[i].shape[1])
        p_tile = p_x + tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + o_d[None, :]
        tl.store(p_tile, b_rows[i].to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d < head.HEAD_DIM)[None, :])


@triton.jit
def zero_rows(head, ROWS: tl.constexpr):
    """Return zeroed rows in fp32, to accumulate in."""
    b_rows = (tl.zeros([ROWS, head.D1], tl.float32),)
    if head.D2 > 0:
        b_rows = b_rows + (tl.zeros([ROWS, head.D2], tl.float32),)
    return b_rows


@triton.jit
def scale_rows(b_rows, factor):
    b_scaled = ()
    for i in tl.static_range(len(b_rows)):
        b_scaled = b_scaled + (b_rows[i] * factor,)
    return b_scaled


@triton.jit
def add_rows(b_a, b_b):
    b_sum = ()
    for i in tl.static_range(len(b_a)):
        b_sum = b_sum + (b_a[i] + b_b[i],)
    return b_sum


@triton.jit
def inner_product(b_a, b_b, head):
    """Return a b^T."""
    b_out = tl.dot(b_a[0], tl.trans(b_b[0]), input_precision=head.PRECISION)
    if head.D2 > 0:
        b_out = tl.dot(b_a[1], tl.trans(b_b[1]), b_out, input_precision=head.PRECISION)
    return b_out


@triton.jit
def add_weighted(b_sum, b_weights, b_rows, head):
    """Return sum + weights rows."""
    b_weights = b_weights.to(b_rows[0].dtype)
    b_added = ()
    for i in tl.static_range(len(b_rows)):
        b_added = b_added + (tl.dot(b_weights, b_rows[i], b_sum[i], input_precision=head.PRECISION),)
    return b_added


@triton.jit
def _bias(
    head, i_row, i_column, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):  # [BM, BN], transposed [BN, BM]
    i_position = head.offset + i_row
    b_bias = tl.zeros([BN, BM], tl.float32) if TRANSPOSED else tl.zeros([BM, BN], tl.float32)
    if i_column - (i_position + BM - 1) >= head.reach:
        b_bias += tl.load(head.p_bias + 2 * head.reach).to(tl.float32)
    elif i_position - (i_column + BN - 1) >= head.reach:
        b_bias += tl.load(head.p_bias).to(tl.float32)
    else:
        o_position = i_position + tl.arange(0, BM)
        o_column = i_column + tl.arange(0, BN)
        o_distance = o_column[:, None] - o_position[None, :] if TRANSPOSED else o_column[None, :] - o_position[:, None]
        o_distance = tl.minimum(tl.maximum(o_distance, -head.reach), head.reach) + head.reach
        b_bias += tl.load(head.p_bias + o_distance).to(tl.float32)
    return b_bias


@triton.jit
def attention_scores(
    b_q, b_k, head, i_row, i_column, BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr, TRANSPOSED: tl.constexpr
):  # [BM, BN], transposed [BN, BM]
    """Return log2(e) times the scores; with CHECK, -inf where causality forbids. The caller masks missing keys."""
    LOG2E = 1.4426950408889634
    b_s = inner_product(b_k, b_q, head) if TRANSPOSED else inner_product(b_q, b_k, head)
    b_s *= head.scale * LOG2E
    if head.p_bias is not None:
        b_s += _bias(head, i_row, i_column, BM, BN, TRANSPOSED) * LOG2E
    if CHECK and head.CAUSAL:
        o_column = i_column + tl.arange(0, BN)
        o_position = head.offset + i_row + tl.arange(0, BM)
        if TRANSPOSED:
            b_s = tl.where(o_column[:, None] <= o_position[None, :], b_s, float("-inf"))
        else:
            b_s = tl.where(o_column[None, :] <= o_position[:, None], b_s, float("-inf"))
    return b_s


@triton.jit
def load_keys_and_score(b_q, head, i_row, i_column, BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr):
    """Return BN keys from i_column on, and the scores [BM, BN], -inf for pairs that may not attend.

    Without CHECK, all keys must exist and causality must allow all pairs.
    """
    o_column = i_column + tl.arange(0, BN)
    m_column = (o_column < head.keys) if CHECK else None
    b_k = load_rows(head.p_k, head.stride_k, i_column, m_column, head, BN)
    b_s = attention_scores(b_q, b_k, head, i_row, i_column, BM, BN, CHECK, False)
    if head.p_mask is not None:
        m_key = tl.load(head.p_mask + o_column, mask=o_column < head.keys, other=0) != 0
        b_s = tl.where(m_key[None, :], b_s, float("-inf"))
    elif CHECK:
        b_s = tl.where((o_column < head.keys)[None, :], b_s, float("-inf"))
    return b_k, b_s


@triton.jit
def load_values(head, i_column, BN: tl.constexpr, CHECK: tl.constexpr):
    m_column = (i_column + tl.arange(0, BN) < head.keys) if CHECK else None
    return load_rows(head.p_v, head.stride_v, i_column, m_column, head, BN)


@triton.jit
def dropout_keep(
    head, i_row, i_column, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):  # [BM, BN], transposed [BN, BM]
    """Return which probabilities dropout keeps, as in `dropout_mask`. i_column is a multiple of 4."""
    GROUPS: tl.constexpr = BN // 4
    o_group = i_column // 4 + tl.arange(0, GROUPS)
    o_row = i_row + tl.arange(0, BM)
    if TRANSPOSED:
        b_zero = tl.zeros([GROUPS, BM], tl.int32)
        b_group, b_row = b_zero + o_group[:, None], b_zero + o_row[None, :]
    else:
        b_zero = tl.zeros([BM, GROUPS], tl.int32)
        b_group, b_row = b_zero + o_group[None, :], b_zero + o_row[:, None]
    b_keep = keep_four(tl.load(head.p_seed), head.threshold, b_group, b_row, b_zero + head.i_bh, b_zero + head.i_map)
    b_keep = tl.reshape(tl.permute(b_keep, (0, 2, 3, 1)), [BN, BM]) if TRANSPOSED else tl.reshape(b_keep, [BM, BN])
    return b_keep != 0


@triton.jit
def score_gradient(b_p, b_delta, b_g, b_v, b_keep, head):
    """Return ds [BM, BN] = p * (r g v^T - delta); r is 1 if b_keep is None."""
    b_dp = inner_product(b_g, b_v, head)
    if b_keep is not None:
        b_dp = tl.where(b_keep, b_dp * head.rescale, 0.0)
    return b_p * (b_dp - b_delta[:, None])
