"""The gradients of `lion_kernels.attention.forward`, from lse, the output and its gradient g.

With `gate` the factor of the output in a sum over maps, or 1:

    delta = rowsum(g * out)                                      its sum over rows is the gate's gradient
    ds = p * (r * g v^T - delta),   p = exp(s - lse)
    dq = gate * scale * ds k,   dk = gate * scale * ds^T q,   dv = gate * (r * p)^T g

One kernel computes dq, another dk and dv, so every sum has one owner and one order, without atomics. As in forward, the
last tile comes first.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

from lion_kernels.attention.forward import NOT_SPECIALIZED
from lion_kernels.attention.tiles import (
    Head,
    add_rows,
    add_weighted,
    attention_scores,
    dropout_keep,
    inner_product,
    load_keys_and_score,
    load_rows,
    load_values,
    locate,
    scale_rows,
    score_gradient,
    store_rows,
    zero_rows,
)
from lion_kernels.core.backend import tl, triton


@triton.jit
def _query_step(
    b_dq, b_q, b_g, b_lse, b_delta, head, i_row, i_column, BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr
):
    """Add one tile of keys to ds k."""
    b_keep = None
    if head.p_seed is not None:
        b_keep = dropout_keep(head, i_row, i_column, BM, BN, False)
    b_k, b_s = load_keys_and_score(b_q, head, i_row, i_column, BM, BN, CHECK)
    # [BM, BN]
    b_p = tl.math.exp2(b_s - b_lse[:, None])
    b_v = load_values(head, i_column, BN, CHECK)
    b_ds = score_gradient(b_p, b_delta, b_g, b_v, b_keep, head)
    return add_weighted(b_dq, b_ds, b_k, head)


@triton.jit
def _query_rows(
    p_gate, p_out, p_grad, p_lse, p_delta, p_previous, p_dq, stride_out, stride_grad, stride_dq, head, i_row,
    BM: tl.constexpr, BN: tl.constexpr, COLUMN_TAIL: tl.constexpr,
):  # fmt: skip
    """Compute delta and, unless p_dq is None, dq for BM queries from i_row on."""
    i_position = head.offset + i_row
    o_row = i_row + tl.arange(0, BM)
    m_row = o_row < head.queries
    b_g = load_rows(p_grad, stride_grad, i_row, m_row, head, BM)
    b_o = load_rows(p_out, stride_out, i_row, m_row, head, BM)
    # [BM]
    b_delta = tl.zeros([BM], tl.float32)
    for i in tl.static_range(len(b_g)):
        b_delta += tl.sum(b_g[i].to(tl.float32) * b_o[i].to(tl.float32), 1)
    tl.store(p_delta + o_row, b_delta, mask=m_row)
    if p_dq is not None:
        b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
        b_q = load_rows(head.p_q, head.stride_q, i_row, m_row, head, BM)
        b_dq = zero_rows(head, BM)

        plain = (i_position + 1) // BN if head.CAUSAL else tl.maximum(tl.cdiv(head.keys, BN) - 1, 0)
        if COLUMN_TAIL > 0:
            b_dq = _query_step(b_dq, b_q, b_g, b_lse, b_delta, head, i_row, plain * BN, BM, COLUMN_TAIL, True)
        for i_n in range(0, plain):
            b_dq = _query_step(b_dq, b_q, b_g, b_lse, b_delta, head, i_row, i_n * BN, BM, BN, False)
        if head.CAUSAL:
            for i_n in range(plain, tl.cdiv(tl.minimum(head.keys, i_position + BM), BN)):
                b_dq = _query_step(b_dq, b_q, b_g, b_lse, b_delta, head, i_row, i_n * BN, BM, BN, True)

        factor = head.scale * tl.load(p_gate + head.i_map).to(tl.float32) if p_gate is not None else head.scale
        b_dq = scale_rows(b_dq, factor)
        if p_previous is not None:
            b_dq = add_rows(b_dq, load_rows(p_previous, stride_dq, i_row, m_row, head, BM))
        store_rows(p_dq, stride_dq, i_row, b_dq, m_row, head, BM)


@triton.jit
def _query_tile(
    head, p_gate, p_out, p_grad, p_lse, p_delta, p_previous, p_dq, stride_out, stride_grad, stride_dq, i_m,
    BM: tl.constexpr, BN: tl.constexpr, ROW_TAIL: tl.constexpr, COLUMN_TAIL: tl.constexpr,
):  # fmt: skip
    if ROW_TAIL == 0 or i_m < tl.cdiv(head.queries, BM) - 1:
        _query_rows(
            p_gate, p_out, p_grad, p_lse, p_delta, p_previous, p_dq, stride_out, stride_grad, stride_dq, head,
            i_m * BM, BM, BN, COLUMN_TAIL,
        )  # fmt: skip
    else:
        _query_rows(
            p_gate, p_out, p_grad, p_lse, p_delta, p_previous, p_dq, stride_out, stride_grad, stride_dq, head,
            i_m * BM, ROW_TAIL, BN, COLUMN_TAIL,
        )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_backward_queries(
    p_q,  # [B, L, H, Dh]
    p_k,  # [B, M, H, Dh]
    p_v,  # [B, M, H, Dh]
    p_mask,  # [B, M] bytes, or None
    p_bias,  # [H, 2 * reach + 1], or None
    p_seed,  # int64 [], or None
    p_gate,  # [S], or None
    p_out,  # [B, L, *, H, Dh], rows stride_out_row apart
    p_grad,  # [B, L, *, H, Dh], rows stride_grad_row apart
    p_lse,  # [B, H, L]
    p_delta,  # [B, H, L]
    p_previous,  # [B, L, H, Dh], the sum over previous maps, or None
    p_dq,  # [B, L, H, Dh], or None
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
    """Compute delta and the queries' gradient for one tile of queries of one head."""
    tiles = tl.cdiv(queries, BM)
    i_m = tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    located = locate(
        p_q, p_k, p_v, stride_q_batch, stride_q_row, stride_q_head, stride_k_batch, stride_k_row, stride_k_head,
        stride_v_batch, stride_v_row, stride_v_head, i_b, i_h, UNIT,
    )  # fmt: skip
    stride_out = stride_out_row.to(tl.int64) * 8
    stride_grad = stride_grad_row.to(tl.int64) * 8
    stride_dq = heads.to(tl.int64) * HEAD_DIM
    p_out += i_b * queries * stride_out + i_h * HEAD_DIM
    p_grad += i_b * queries * stride_grad + i_h * HEAD_DIM
    if p_dq is not None:
        p_dq += i_b * queries * stride_dq + i_h * HEAD_DIM
    p_lse += i_bh.to(tl.int64) * queries
    p_delta += i_bh.to(tl.int64) * queries
    if p_previous is not None:
        p_previous += i_b * queries * stride_dq + i_h * HEAD_DIM
    _query_tile(
        Head(
            *located, None if p_mask is None else p_mask + i_b * keys,
            None if p_bias is None else p_bias + i_h * (2 * reach + 1), queries, keys, keys - queries, reach, scale,
            i_bh, i_map, p_seed, threshold, rescale, HEAD_DIM, D1, D2, CAUSAL, PRECISION,
        ),
        p_gate, p_out, p_grad, p_lse, p_delta, p_previous, p_dq, stride_out, stride_grad, stride_dq, i_m,
        BM, BN, ROW_TAIL, COLUMN_TAIL,
    )  # fmt: skip


@triton.jit
def _key_step(
    b_dk, b_dv, b_k, b_v, m_key, p_grad, p_lse, p_delta, stride_grad, head, i_row, i_column,
    BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to ds^T q and (r p)^T g; an accumulator that is () stays ().

    The scores are transposed here, because they are the left factors.
    """
    o_row = i_row + tl.arange(0, BM)
    m_row = o_row < head.queries if CHECK else None
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf")) if CHECK else tl.load(p_lse + o_row)
    b_q = load_rows(head.p_q, head.stride_q, i_row, m_row, head, BM)
    if head.p_seed is not None:
        b_keep = dropout_keep(head, i_row, i_column, BM, BN, True)
    # [BN, BM]
    b_s = attention_scores(b_q, b_k, head, i_row, i_column, BM, BN, CHECK, True)
    if m_key is not None:
        b_s = tl.where(m_key[:, None], b_s, float("-inf"))
    b_p = tl.math.exp2(b_s - b_lse[None, :])
    b_g = load_rows(p_grad, stride_grad, i_row, m_row, head, BM)
    if len(b_dv) > 0:
        b_weights = tl.where(b_keep, b_p, 0.0) if head.p_seed is not None else b_p
        b_dv = add_weighted(b_dv, b_weights, b_g, head)
    if len(b_dk) > 0:
        b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0) if CHECK else tl.load(p_delta + o_row)
        b_dp = inner_product(b_v, b_g, head)
        if head.p_seed is not None:
            b_dp = tl.where(b_keep, b_dp * head.rescale, 0.0)
        b_dk = add_weighted(b_dk, b_p * (b_dp - b_delta[None, :]), b_q, head)
    return b_dk, b_dv


@triton.jit
def _key_rows(
    p_gate, p_grad, p_lse, p_delta, p_dk, p_dv, stride_grad, stride_dk, head, i_column,
    BM: tl.constexpr, BN: tl.constexpr, ROW_TAIL: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv, unless p_dk or p_dv is None, for BN keys from i_column on."""
    o_column = i_column + tl.arange(0, BN)
    m_column = o_column < head.keys
    m_key = None
    if head.p_mask is not None:
        m_key = tl.load(head.p_mask + o_column, mask=m_column, other=0) != 0
    b_k = load_rows(head.p_k, head.stride_k, i_column, m_column, head, BN)
    b_v = load_rows(head.p_v, head.stride_v, i_column, m_column, head, BN)
    b_dk = ()
    b_dv = ()
    if p_dk is not None:
        b_dk = zero_rows(head, BN)
    if p_dv is not None:
        b_dv = zero_rows(head, BN)

    first = 0
    plain = tl.maximum(tl.cdiv(head.queries, BM) - 1, 0)
    if ROW_TAIL > 0:
        b_dk, b_dv = _key_step(
            b_dk, b_dv, b_k, b_v, m_key, p_grad, p_lse, p_delta, stride_grad, head, plain * BM, i_column,
            ROW_TAIL, BN, True,
        )  # fmt: skip
    if head.CAUSAL:
        # The first query that attends the first key, and the first that attends the last one.
        begin = tl.maximum(i_column - head.offset, 0) // BM
        first = tl.minimum(tl.cdiv(tl.maximum(i_column + BN - 1 - head.offset, 0), BM), plain)
        for i_m in range(begin, first):
            b_dk, b_dv = _key_step(
                b_dk, b_dv, b_k, b_v, m_key, p_grad, p_lse, p_delta, stride_grad, head, i_m * BM, i_column,
                BM, BN, True,
            )  # fmt: skip
    for i_m in range(first, plain):
        b_dk, b_dv = _key_step(
            b_dk, b_dv, b_k, b_v, m_key, p_grad, p_lse, p_delta, stride_grad, head, i_m * BM, i_column, BM, BN, False,
        )  # fmt: skip

    gate = tl.load(p_gate + head.i_map).to(tl.float32) if p_gate is not None else 1.0
    if p_dk is not None:
        store_rows(p_dk, stride_dk, i_column, scale_rows(b_dk, head.scale * gate), m_column, head, BN)
    if p_dv is not None:
        store_rows(p_dv, stride_dk, i_column, scale_rows(b_dv, head.rescale * gate), m_column, head, BN)


@triton.jit
def _key_tile(
    head, p_gate, p_grad, p_lse, p_delta, p_dk, p_dv, stride_grad, stride_dk, i_n,
    BM: tl.constexpr, BN: tl.constexpr, ROW_TAIL: tl.constexpr, COLUMN_TAIL: tl.constexpr,
):  # fmt: skip
    if COLUMN_TAIL == 0 or i_n < tl.cdiv(head.keys, BN) - 1:
        _key_rows(p_gate, p_grad, p_lse, p_delta, p_dk, p_dv, stride_grad, stride_dk, head, i_n * BN, BM, BN, ROW_TAIL)
    else:
        _key_rows(
            p_gate, p_grad, p_lse, p_delta, p_dk, p_dv, stride_grad, stride_dk, head, i_n * BN, BM, COLUMN_TAIL,
            ROW_TAIL,
        )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_backward_keys(
    p_q,  # [B, L, H, Dh]
    p_k,  # [B, M, H, Dh]
    p_v,  # [B, M, H, Dh]
    p_mask,  # [B, M] bytes, or None
    p_bias,  # [H, 2 * reach + 1], or None
    p_seed,  # int64 [], or None
    p_gate,  # [S], or None
    p_grad,  # [B, L, *, H, Dh], rows stride_grad_row apart
    p_lse,  # [B, H, L]
    p_delta,  # [B, H, L], or None if p_dk is
    p_dk,  # [B, M, H, Dh], or None
    p_dv,  # [B, M, H, Dh], or None
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
    """Compute the gradients of keys and values for one tile of keys of one head.

    ROW_TAIL is the width of the last tile of queries, COLUMN_TAIL that of the last tile of keys if it is narrow.
    """
    tiles = tl.cdiv(keys, BN)
    i_n = tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    located = locate(
        p_q, p_k, p_v, stride_q_batch, stride_q_row, stride_q_head, stride_k_batch, stride_k_row, stride_k_head,
        stride_v_batch, stride_v_row, stride_v_head, i_b, i_h, UNIT,
    )  # fmt: skip
    stride_grad = stride_grad_row.to(tl.int64) * 8
    stride_dk = heads.to(tl.int64) * HEAD_DIM
    p_grad += i_b * queries * stride_grad + i_h * HEAD_DIM
    p_lse += i_bh.to(tl.int64) * queries
    if p_dk is not None:
        p_delta += i_bh.to(tl.int64) * queries
        p_dk += i_b * keys * stride_dk + i_h * HEAD_DIM
    if p_dv is not None:
        p_dv += i_b * keys * stride_dk + i_h * HEAD_DIM
    _key_tile(
        Head(
            *located, None if p_mask is None else p_mask + i_b * keys,
            None if p_bias is None else p_bias + i_h * (2 * reach + 1), queries, keys, keys - queries, reach, scale,
            i_bh, i_map, p_seed, threshold, rescale, HEAD_DIM, D1, D2, CAUSAL, PRECISION,
        ),
        p_gate, p_grad, p_lse, p_delta, p_dk, p_dv, stride_grad, stride_dk, i_n, BM, BN, ROW_TAIL, COLUMN_TAIL,
    )  # fmt: skip
