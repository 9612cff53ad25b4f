"""T5's attention: no scale, and a learned bias by head and bucketed distance (Raffel et al., arXiv 1910.10683).

    out = softmax(s) v,   s_ij = q_i k_j^T + bias_table[bucket(j - i)]          i, j the positions of query and key

The buckets of the distances -max_distance .. max_distance are a small table made once; from max_distance on they are
all the same. So a head's bias is a vector of 2 max_distance + 1 values, which the kernels of `lion_kernels.attention`
read by distance, and nothing is as large as the scores. Backward there gives dq, dk, dv from ds = p * (g v^T - delta).

The table's gradient sums ds over the pairs of a bucket, in two stages of fixed order. A program goes along one
diagonal of tiles, where an element of the tile always has the same distance: it forms ds again, adds the tiles up in
registers, and only then sorts the one sum into buckets. The second stage adds up the programs' buckets; there are
O(L + M) of them.
"""

# A kernel's constexpr arguments take plain values, and a launch has keywords of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from functools import cache, partial

import torch
from torch import Tensor

from lion_kernels.attention import launch as attention
from lion_kernels.attention.launch import Attention
from lion_kernels.attention.plain import draw_keep, library_attention, plain_attention, plain_attention_backward
from lion_kernels.attention.sizes import bias_gradient_sizes, split_head_dim
from lion_kernels.attention.tiles import (
    Head,
    dropout_keep,
    load_keys_and_score,
    load_rows,
    load_values,
    locate,
    score_gradient,
)
from lion_kernels.core.backend import (
    LAUNCH,
    interpreting,
    needs_dispatch,
    on_device,
    refuse_uninterpretable,
    resolve_backend,
    tl,
    triton,
)
from lion_kernels.core.cost import Cost
from lion_kernels.core.dropout import check_dropout, seed_tensor
from lion_kernels.core.rowwise import last_contiguous
from lion_kernels.core.specs import KernelSpec
from lion_kernels.core.tuned_sizes import is_compact

_NOT_SPECIALIZED = [
    *(f"stride_{tensor}_{dim}" for tensor in ("q", "k", "v") for dim in ("batch", "row", "head")),
    *("batch", "queries", "keys", "heads", "reach", "num_buckets", "diagonals", "chunk", "i_map", "threshold"),
]


@triton.jit
def _score_gradient(head, p_grad, p_lse, p_delta, stride_grad, i_row, i_column, BLOCK: tl.constexpr):
    """ds of BLOCK queries from i_row on and BLOCK keys from i_column on."""
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
    p_seed,  # [] of int64, or None
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
    """One diagonal of tiles [BLOCK, BLOCK] of one head, over `chunk` elements of the batch: ds by bucket."""
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


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    bidirectional: bool,
    max_distance: int,
    causal: bool,
    dropout_p: float,
) -> Attention:
    """As the kernels take it, with the table's bias by distance [H, 2 * max_distance + 1]."""
    buckets = bucket_by_distance(bias_table.shape[0], max_distance, bidirectional, bias_table.device)
    return Attention(
        last_contiguous(q),
        last_contiguous(k),
        last_contiguous(v),
        scale=1.0,
        mask=mask,
        bias=bias_table.t().index_select(1, buckets),
        reach=max_distance,
        causal=causal,
        dropout_p=dropout_p,
        seed=seed,
    )


def _launch_forward(one: Attention, *, save: bool) -> tuple[Tensor, Tensor | None]:
    """The output and, to `save`, lse."""
    batch, length, heads, _ = one.q.shape
    out = torch.empty_like(one.q, memory_format=torch.contiguous_format)
    lse = one.q.new_empty(batch, heads, length, dtype=torch.float32) if save else None
    attention.attend(one, out, lse)
    return out, lse


def _launch_backward(
    one: Attention, grad: Tensor, out: Tensor, lse: Tensor, bias_table: Tensor, bidirectional: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    needs_q, needs_k, _, needs_bias = needs
    delta = torch.empty_like(lse) if needs_q or needs_k or needs_bias else None
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip((one.q, one.k, one.v), needs[:3], strict=True)
    ]
    attention.attend_backward(one, grad, out, lse, delta, *gradients)
    dtable = None
    if needs_bias:
        assert delta is not None
        dtable = _launch_bias_gradient(one, grad, lse, delta, bias_table, bidirectional)
    inputs = (one.q, one.k, one.v, bias_table)
    dq, dk, dv, dtable = (
        x.new_empty(0) if gradient is None else gradient
        for x, gradient in zip(inputs, (*gradients, dtable), strict=True)
    )
    return dq, dk, dv, dtable


def _launch_bias_gradient(
    one: Attention, grad: Tensor, lse: Tensor, delta: Tensor, bias_table: Tensor, bidirectional: bool
) -> Tensor:
    (batch, queries, heads, _), keys, num_buckets = one.q.shape, one.k.shape[1], bias_table.shape[0]
    width = sum(split_head_dim(one.q.shape[-1]))
    compact = is_compact(one.q.device)
    sizes = bias_gradient_sizes(one.q.dtype, width, dropout=one.seed is not None, compact=compact)
    block = sizes["BLOCK"]
    last = triton.cdiv(keys, block) - 1
    if one.causal:
        last = min(last, (block - 1 + keys - queries) // block)
    diagonals = triton.cdiv(queries, block) + last
    # Enough programs for any GPU, from the shape alone: the order of the sum must not depend on where it runs.
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
    """The bucket of each distance (key position - query position, integers of any shape).

    Half of the buckets hold one distance each; the other half divides the distances up to `max_distance` evenly on a
    logarithmic scale, and its last bucket holds everything beyond. Bidirectional: one such series for keys at or
    before the query, another for keys after it. Otherwise keys after the query fall into bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        first = torch.zeros_like(distance)
        distance = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    # fp32 whatever the model's dtype: that is where the published weights have their bucket boundaries.
    position = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (position * (num_buckets - num_exact)).long()
    return first + torch.where(distance < num_exact, distance, logarithmic.clamp(max=num_buckets - 1))


@cache
def bucket_by_distance(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """The buckets of the distances -max_distance .. max_distance, computed on the CPU whose logarithm is the reference.

    At max_distance the last bucket has begun, whichever way the logarithm is rounded: it begins a whole step earlier.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    return relative_position_bucket(distance, num_buckets, max_distance, bidirectional).to(device)


@torch.library.custom_op("lion_kernels::relative_bias_attention", mutates_args=(), device_types="cuda")
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    bidirectional: bool,
    max_distance: int,
    causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The output and lse [B, H, L]."""
    one = _attention(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p)
    out, lse = _launch_forward(one, save=True)
    assert lse is not None
    return out, lse


@_forward_op.register_kernel("cpu")
def _(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p):
    if interpreting():
        one = _attention(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p)
        return _launch_forward(one, save=True)
    bias, _ = _dense_bias(q, k, bias_table, bidirectional, max_distance)
    return plain_attention(q, k, v, bias, _visible(q, k, mask, causal), draw_keep(q, k, seed, dropout_p), 1.0)


@_forward_op.register_fake
def _(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p):
    batch, length, heads, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=lse_dtype)


@torch.library.custom_op("lion_kernels::relative_bias_attention_backward", mutates_args=(), device_types="cuda")
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bidirectional: bool,
    max_distance: int,
    causal: bool,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias_table; one that `needs` does not name is empty."""
    one = _attention(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p)
    return _launch_backward(one, grad, out, lse, bias_table, bidirectional, needs)


@_backward_op.register_kernel("cpu")
def _(
    grad, q, k, v, bias_table, mask, seed, out, lse, bidirectional, max_distance, causal, dropout_p, needs
):  # fmt: skip
    if interpreting():
        one = _attention(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p)
        return _launch_backward(one, grad, out, lse, bias_table, bidirectional, needs)
    bias, buckets = _dense_bias(q, k, bias_table, bidirectional, max_distance)
    visible, keep = _visible(q, k, mask, causal), draw_keep(q, k, seed, dropout_p)
    (dq, dk, dv), ds, _ = plain_attention_backward(grad, q, k, v, out, lse, bias, visible, keep, 1.0, needs[:3])
    if not needs[3]:
        return dq, dk, dv, bias_table.new_empty(0)
    by_pair = ds.sum(0).flatten(1).t()  # [L * M, H]
    dtable = torch.zeros_like(bias_table, dtype=ds.dtype, memory_format=torch.contiguous_format)
    return dq, dk, dv, dtable.index_add_(0, buckets.flatten(), by_pair).to(bias_table.dtype)


@_backward_op.register_fake
def _(
    grad, q, k, v, bias_table, mask, seed, out, lse, bidirectional, max_distance, causal, dropout_p, needs
):  # fmt: skip
    inputs = (q, k, v, bias_table)
    dq, dk, dv, dtable = (x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs, strict=True))
    return dq, dk, dv, dtable


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bias_table, mask, seed, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, bias_table, mask, seed, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:4])
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.options, needs)
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return *wanted, None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def relative_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    bidirectional: bool = True,
    max_distance: int = 128,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head self-attention with T5's relative position bias and without a scale.

    Differentiable in q, k, v and bias_table. q, k and v have one dtype and any strides, such as those of slices of a
    packed projection; under autocast they are cast to its dtype. The table may have another dtype.

    Args:
        q: [B, L, H, Dh], the last L of the M positions of k.
        k, v: [B, M, H, Dh], M >= L.
        bias_table: [num_buckets, H].
        key_padding_mask: [B, M], nonzero where a key may be attended.
        bidirectional: whether keys before and after the query have buckets of their own.
        max_distance: the distance from which on all share a bucket.
        causal: whether a query may attend only keys up to its own position.
        dropout_p: the share of the probabilities that dropout zeroes; 0 outside training.
        seed: of dropout, an int64, or a tensor [] of one on q's device, which a CUDA graph reads at each replay; None
            draws one from PyTorch's generator, in a CUDA graph at each replay. The mask that belongs to it, the same in
            both backends, is `lion_kernels.attention.plain.dropout_mask`.
        backend: "auto", "triton" (fp16, bf16 or fp32, Dh a multiple of 8 up to 128) or "torch" (any).

    Returns:
        [B, L, H, Dh]. A query that may attend no key gets zeros.

    Raises:
        ValueError: a shape, a dtype, a device, max_distance, dropout_p, seed or backend that does not fit; the message
            names it.
    """
    _check(q, k, v, bias_table, key_padding_mask, bidirectional, max_distance)
    check_dropout(dropout_p, seed, q.device)
    dtype = attention.autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    mask = None if key_padding_mask is None else key_padding_mask.bool().contiguous()
    chosen = resolve_backend(backend, "relative_bias_attention", q.device)
    seed = seed_tensor(seed, dropout_p, q.device)
    if chosen == "triton" and backend == "triton":
        attention.check_supported(q)
    arguments = (q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p)
    if chosen == "torch" or not attention.supported(q):
        return _compose(*arguments)
    refuse_uninterpretable(q=q, bias_table=bias_table)
    if needs_dispatch(q, k, v, bias_table):
        return _forward_op(*arguments)[0]
    return _launch_forward(_attention(*arguments), save=False)[0]


def _compose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    bidirectional: bool,
    max_distance: int,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    """The operator in PyTorch."""
    bias, _ = _dense_bias(q, k, bias_table, bidirectional, max_distance)
    visible = _visible(q, k, mask, causal)
    if seed is None:
        return library_attention(q, k, v, bias, visible, 1.0)
    return plain_attention(q, k, v, bias, visible, draw_keep(q, k, seed, dropout_p), 1.0)[0]


def _distances(q: Tensor, k: Tensor) -> Tensor:
    """Key position - query position, [L, M]."""
    positions = torch.arange(k.shape[1], device=q.device)
    return positions[None, :] - positions[k.shape[1] - q.shape[1] :, None]


def _dense_bias(
    q: Tensor, k: Tensor, bias_table: Tensor, bidirectional: bool, max_distance: int
) -> tuple[Tensor, Tensor]:
    """The bias of every pair [H, L, M], and its bucket [L, M]."""
    buckets = relative_position_bucket(_distances(q, k), bias_table.shape[0], max_distance, bidirectional)
    return bias_table[buckets].movedim(-1, 0), buckets


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which scores count, broadcasting to [B, H, L, M]."""
    visible = (_distances(q, k) <= 0)[None, None] if causal else None
    if mask is not None:
        mask = mask[:, None, None, :]
        visible = mask if visible is None else visible & mask
    return visible


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    key_padding_mask: Tensor | None,
    bidirectional: bool,
    max_distance: int,
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, L, H, Dh], got {list(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    batch, length, heads, head_dim = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, head_dim) or k.shape[1] < length:
        raise ValueError(f"k: expected {[batch, f'M >= {length}', heads, head_dim]} (from q), got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected {list(k.shape)} (from k), got {list(v.shape)}")
    if bias_table.dim() != 2 or bias_table.shape[1] != heads:
        raise ValueError(f"bias_table: expected [num_buckets, {heads}] (H from q), got {list(bias_table.shape)}")
    if not bias_table.is_floating_point():
        raise ValueError(f"bias_table: expected a floating dtype, got {bias_table.dtype}")
    if key_padding_mask is not None and key_padding_mask.shape != k.shape[:2]:
        raise ValueError(f"key_padding_mask: expected {list(k.shape[:2])} (from k), got {list(key_padding_mask.shape)}")
    num_exact = bias_table.shape[0] // (4 if bidirectional else 2)
    if num_exact < 1:
        least = 4 if bidirectional else 2
        raise ValueError(f"bias_table: expected num_buckets >= {least}, got {bias_table.shape[0]}")
    if max_distance <= num_exact:
        raise ValueError(f"max_distance: expected more than {num_exact} (from bias_table), got {max_distance}")
    attention.check_alike(q, {"k": k, "v": v})
    attention.check_device(q, {"bias_table": bias_table, "key_padding_mask": key_padding_mask})


def cost(q: Tensor, k: Tensor, *, causal: bool = False, learn_bias: bool = False) -> tuple[Cost, Cost]:
    """What forward and backward cannot avoid moving and computing, from the shapes and the dtype; the table is nothing.

    Backward forms the scores again and has four products more, and reuses them for the table.
    """
    batch, length, heads, head_dim = q.shape
    keys = k.shape[1]
    pairs = batch * heads * (length * (keys - length) + length * (length + 1) // 2 if causal else length * keys)
    values = (2 * q.numel() + 2 * k.numel()) * q.element_size()  # q, k and v read, out written
    lse = 4 * batch * heads * length
    table = 4 * batch * heads * length if learn_bias else 0
    return Cost(values, 4 * pairs * head_dim), Cost(
        2 * values + lse + table, (10 * head_dim + (1 if learn_bias else 0)) * pairs
    )


def kernel_specs() -> list[KernelSpec]:
    """Every kernel as it ships, for the ahead-of-time report."""
    name = "relative_bias_attention"
    specs: list[KernelSpec] = []
    for compact in (False, True):
        biased = partial(attention.specs, name, bias=True, mask=True, compact=compact)
        for head_dim in (64, 128):
            specs += biased(head_dim)
            specs += biased(head_dim, causal=True)
            specs += biased(head_dim, causal=True, dropout=True)
            specs += biased(head_dim, rows="few")
            specs += biased(head_dim, rows="some", causal=True)
            specs += biased(head_dim, rows="some", causal=True, dropout=True)
            for dropout in (False, True):
                for dtype in (torch.bfloat16, torch.float32):
                    specs.append(_bias_gradient_spec(name, head_dim, dtype, dropout, compact))
        # In fp32 head dimensions above 96 spill: without the matrix units they are slow anyway.
        specs += biased(64, torch.float32, dropout=True)
    return specs


def _bias_gradient_spec(name: str, head_dim: int, dtype: torch.dtype, dropout: bool, compact: bool) -> KernelSpec:
    sizes = bias_gradient_sizes(dtype, sum(split_head_dim(head_dim)), dropout=dropout, compact=compact)
    kind = "fp32" if dtype == torch.float32 else "bf16"
    suffix = f"{' dropout' if dropout else ''}{' compact' if compact else ''}"
    return attention.kernel_spec(
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
