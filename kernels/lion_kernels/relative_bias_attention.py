"""T5's attention: no scale, and a learned bias per head and bucketed distance (Raffel et al., arXiv 1910.10683).

    out = softmax(s) v,   s_ij = q_i k_j^T + bias_table[bucket(j - i)]          i, j: positions of query and key

A small table, computed once, holds the buckets of the distances -max_distance .. max_distance; all distances beyond
share the outermost buckets. A head's bias is thus a vector of 2 max_distance + 1 values, which the kernels of
`lion_kernels.attention` index by distance, and no tensor is as large as the scores. Their backward computes dq, dk and
dv from ds = p * (g v^T - delta).

`lion_kernels.attention.bias` has the buckets and the table's gradient, which sums ds over the pairs of a bucket.
"""

from functools import partial

import torch
from torch import Tensor

from lion_kernels.attention import launch as attention
from lion_kernels.attention.bias import bias_gradient_spec
from lion_kernels.attention.biased import (
    BiasedAttention,
    compose,
    fake_backward,
    fake_forward,
    launch_backward,
    launch_forward,
    plain_backward,
    plain_forward,
)
from lion_kernels.attention.specs import attention_specs
from lion_kernels.core import operator
from lion_kernels.core.arguments import as_int64, check_flag, check_floating, check_tensors
from lion_kernels.core.backend import autocast_dtype, choose_backend, needs_dispatch, refuse_uninterpretable
from lion_kernels.core.cost import Cost
from lion_kernels.core.dropout import check_dropout, seed_tensor
from lion_kernels.core.specs import KernelSpec

MAX_DISTANCE = 65536  # the kernels read the bias from a table of 2 * max_distance + 1 values for each head


def _bundle(
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
) -> tuple:
    return (BiasedAttention(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p),)


def _bundle_backward(
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
) -> tuple:
    (call,) = _bundle(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p)
    return grad, call, out, lse, needs


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bias_table, mask, seed, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, bias_table, mask, seed, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:4])
    gradients = backward_op(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *operator.needed_gradients(gradients, needs), None, None, None, None, None, None


def cost(q: Tensor, k: Tensor, *, causal: bool = False, learn_bias: bool = False) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward, from the shapes and the dtype; the table counts as zero.

    Backward recomputes the scores and has four more products, which the table's gradient reuses.
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
    """Return every kernel configuration that ships, for the ahead-of-time report."""
    name = "relative_bias_attention"
    specs: list[KernelSpec] = []
    for compact in (False, True):
        biased = partial(attention_specs, name, bias=True, mask=True, compact=compact)
        for head_dim in (64, 128):
            specs += biased(head_dim)
            specs += biased(head_dim, causal=True)
            specs += biased(head_dim, causal=True, dropout=True)
            specs += biased(head_dim, rows="few")
            specs += biased(head_dim, rows="some", causal=True)
            specs += biased(head_dim, rows="some", causal=True, dropout=True)
            for dropout in (False, True):
                for dtype in (torch.bfloat16, torch.float32):
                    specs.append(bias_gradient_spec(name, head_dim, dtype, dropout, compact))
        # In fp32, head dimensions above 96 spill; without the matrix units they are slow anyway.
        specs += biased(64, torch.float32, dropout=True)
    return specs


backward_op = operator.define(
    "relative_bias_attention_backward",
    launch=launch_backward,
    plain=plain_backward,
    fake=fake_backward,
    bundle=_bundle_backward,
)
forward_op = operator.define(
    "relative_bias_attention",
    launch=launch_forward,
    plain=plain_forward,
    fake=fake_forward,
    bundle=_bundle,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


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
    """Compute multi-head self-attention with T5's relative position bias and without a scale.

    Differentiable in q, k, v and bias_table. q, k and v share one dtype and may have any strides, such as slices of a
    packed projection; under autocast they are cast to its dtype. The table's dtype may differ.

    Args:
        q: [B, L, H, Dh], the last L of the M positions of k; B, L, H and M may be 0.
        k, v: [B, M, H, Dh], M >= L.
        bias_table: [num_buckets, H], with num_buckets at least 2, and 4 if `bidirectional`.
        key_padding_mask: [B, M], bool, integers or floating, nonzero where a key may be attended. Negative values,
            which belong to a mask that is added to the scores, are refused if they are on the CPU.
        bidirectional: whether keys before and after the query have separate buckets.
        max_distance: the distance from which on all distances share a bucket, up to 65536.
        causal: whether a query may attend only keys up to its own position.
        dropout_p: probability of dropping an attention weight; pass 0 outside training.
        seed: of the dropout, an int64 or an int64 tensor [] on q's device, which a CUDA graph reads at each replay.
            None draws a seed from PyTorch's generator, in a CUDA graph at each replay. Both backends derive the same
            mask from it, `lion_kernels.attention.plain.dropout_mask`.
        backend: "auto", "triton" (fp16, bf16 or fp32, Dh a multiple of 8 up to 128) or "torch" (any).

    Returns:
        [B, L, H, Dh]; zero for a query that may attend no key.

    Raises:
        TypeError: an argument of another type; the message names it.
        ValueError: invalid shape, dtype, layout, device, max_distance, dropout_p, seed or backend; the message names
            the argument.
    """
    check_flag("bidirectional", bidirectional)
    check_flag("causal", causal)
    max_distance = as_int64("max_distance", max_distance)
    _check(q, k, v, bias_table, key_padding_mask, bidirectional, max_distance)
    dropout_p = check_dropout(dropout_p, seed, "q", q)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    mask = None if key_padding_mask is None else key_padding_mask.bool().contiguous()
    chosen = choose_backend(backend, "relative_bias_attention", q.device, attention.why_unsupported(q))
    seed = seed_tensor(seed, dropout_p, q.device)
    call = BiasedAttention(q, k, v, bias_table, mask, seed, bidirectional, max_distance, causal, dropout_p)
    if chosen == "torch":
        return compose(call)
    refuse_uninterpretable(q=q, bias_table=bias_table)
    if needs_dispatch(q, k, v, bias_table):
        return forward_op(*call)[0]
    return launch_forward(call, save=False)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor,
    key_padding_mask: Tensor | None,
    bidirectional: bool,
    max_distance: int,
) -> None:
    check_tensors({"q": q, "k": k, "v": v, "bias_table": bias_table}, {"key_padding_mask": key_padding_mask})
    attention.check_queries(q)
    batch, length, heads, head_dim = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, head_dim) or k.shape[1] < length:
        raise ValueError(f"k: expected {[batch, f'M >= {length}', heads, head_dim]} (from q), got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected {list(k.shape)} (from k), got {list(v.shape)}")
    if bias_table.dim() != 2 or bias_table.shape[1] != heads:
        raise ValueError(f"bias_table: expected [num_buckets, {heads}] (H from q), got {list(bias_table.shape)}")
    check_floating("bias_table", bias_table)
    if key_padding_mask is not None:
        if key_padding_mask.shape != k.shape[:2]:
            raise ValueError(
                f"key_padding_mask: expected {list(k.shape[:2])} (from k), got {list(key_padding_mask.shape)}"
            )
        attention.check_mask("key_padding_mask", key_padding_mask)
    num_exact = bias_table.shape[0] // (4 if bidirectional else 2)
    if num_exact < 1:
        least = 4 if bidirectional else 2
        raise ValueError(f"bias_table: expected num_buckets >= {least}, got {bias_table.shape[0]}")
    if max_distance <= num_exact:
        raise ValueError(f"max_distance: expected more than {num_exact} (from bias_table), got {max_distance}")
    if max_distance > MAX_DISTANCE:
        raise ValueError(f"max_distance: expected up to {MAX_DISTANCE}, got {max_distance}")
    attention.check_alike(q, {"k": k, "v": v})
    attention.check_device(q, {"bias_table": bias_table, "key_padding_mask": key_padding_mask})
