"""Attention with T5's bias, on the kernels and in PyTorch; `relative_bias_attention` has the algebra."""

from typing import NamedTuple

import torch
from torch import Tensor

from lion_kernels.attention import launch as attention
from lion_kernels.attention.bias import bucket_by_distance, launch_bias_gradient, relative_position_bucket
from lion_kernels.attention.launch import Attention
from lion_kernels.attention.plain import Terms, draw_keep, library_attention, plain_attention, plain_attention_backward
from lion_kernels.core.operator import empty_gradient
from lion_kernels.core.rowwise import last_contiguous


class BiasedAttention(NamedTuple):
    """One call, in the order of the custom op's arguments.

    Attributes:
        q: [B, L, H, Dh], the last L of the M positions of k.
        k, v: [B, M, H, Dh].
        bias_table: [num_buckets, H].
        mask: contiguous bool [B, M], true where a key may be attended, or None.
        seed: of the dropout, int64 [] on q's device; None without dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias_table: Tensor
    mask: Tensor | None
    seed: Tensor | None
    bidirectional: bool
    max_distance: int
    causal: bool
    dropout_p: float

    @property
    def attention(self) -> Attention:
        """The call as the kernels' `Attention`, with the bias by distance [H, 2 * max_distance + 1]."""
        table = self.bias_table
        buckets = bucket_by_distance(table.shape[0], self.max_distance, self.bidirectional, table.device)
        return Attention(
            last_contiguous(self.q),
            last_contiguous(self.k),
            last_contiguous(self.v),
            scale=1.0,
            mask=self.mask,
            bias=table.t().index_select(1, buckets),
            reach=self.max_distance,
            causal=self.causal,
            dropout_p=self.dropout_p,
            seed=self.seed,
        )


def launch_forward(call: BiasedAttention, *, save: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the output and, with `save`, lse [B, H, L]."""
    one = call.attention
    batch, length, heads, _ = one.q.shape
    out = torch.empty_like(one.q, memory_format=torch.contiguous_format)
    lse = one.q.new_empty(batch, heads, length, dtype=torch.float32) if save else None
    attention.launch_forward(one, out, lse)
    return out, lse


def launch_backward(
    grad: Tensor, call: BiasedAttention, out: Tensor, lse: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and bias_table; one that `needs` excludes is empty."""
    one, table = call.attention, call.bias_table
    grad = grad.contiguous()
    needs_q, needs_k, _, needs_bias = needs
    delta = torch.empty_like(lse) if needs_q or needs_k or needs_bias else None
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip((one.q, one.k, one.v), needs[:3], strict=True)
    ]
    attention.launch_backward(one, grad, out, lse, delta, *gradients)
    dtable = None
    if needs_bias:
        assert delta is not None
        dtable = launch_bias_gradient(one, grad, lse, delta, table, call.bidirectional)
    inputs = (one.q, one.k, one.v, table)
    dq, dk, dv, dtable = (
        x.new_empty(0) if gradient is None else gradient
        for x, gradient in zip(inputs, (*gradients, dtable), strict=True)
    )
    return dq, dk, dv, dtable


def fake_forward(call: BiasedAttention) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = call.q.shape
    lse_dtype = torch.promote_types(call.q.dtype, torch.float32)
    return call.q.new_empty(call.q.shape), call.q.new_empty(batch, heads, length, dtype=lse_dtype)


def fake_backward(grad: Tensor, call: BiasedAttention, out: Tensor, lse: Tensor, needs: list[bool]):
    dq, dk, dv, dtable = (empty_gradient(x, needed) for x, needed in zip(call[:4], needs, strict=True))
    return dq, dk, dv, dtable


def plain_forward(call: BiasedAttention) -> tuple[Tensor, Tensor]:
    """Compute `launch_forward` in PyTorch."""
    bias, _ = _dense_bias(call)
    return plain_attention(call.q, call.k, call.v, Terms(1.0, bias, _visible(call), _keep(call)))


def plain_backward(
    grad: Tensor, call: BiasedAttention, out: Tensor, lse: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `launch_backward` in PyTorch."""
    q, k, v, table = call[:4]
    bias, buckets = _dense_bias(call)
    terms = Terms(1.0, bias, _visible(call), _keep(call))
    (dq, dk, dv), ds, _ = plain_attention_backward(grad, q, k, v, terms, out, lse, needs[:3])
    if not needs[3]:
        return dq, dk, dv, table.new_empty(0)
    by_pair = ds.sum(0).flatten(1).t()  # [L * M, H]
    dtable = torch.zeros_like(table, dtype=ds.dtype, memory_format=torch.contiguous_format)
    return dq, dk, dv, dtable.index_add_(0, buckets.flatten(), by_pair).to(table.dtype)


def compose(call: BiasedAttention) -> Tensor:
    """Compute the operator in PyTorch, differentiable by autograd."""
    if call.seed is None and call.q.numel() and call.k.numel():  # without pairs, SDPA gives the bias no gradient
        bias, _ = _dense_bias(call)
        return library_attention(call.q, call.k, call.v, bias, _visible(call), 1.0)
    return plain_forward(call)[0]


def _distances(call: BiasedAttention) -> Tensor:
    """Return key position - query position, [L, M]."""
    positions = torch.arange(call.k.shape[1], device=call.q.device)
    return positions[None, :] - positions[call.k.shape[1] - call.q.shape[1] :, None]


def _dense_bias(call: BiasedAttention) -> tuple[Tensor, Tensor]:
    """Return the bias of every pair [H, L, M], and its bucket [L, M]."""
    table = call.bias_table
    buckets = relative_position_bucket(_distances(call), table.shape[0], call.max_distance, call.bidirectional)
    return table[buckets].movedim(-1, 0), buckets


def _visible(call: BiasedAttention) -> Tensor | None:
    """Return which scores count, broadcastable to [B, H, L, M]; None for all."""
    visible = (_distances(call) <= 0)[None, None] if call.causal else None
    if call.mask is not None:
        mask = call.mask[:, None, None, :]
        visible = mask if visible is None else visible & mask
    return visible


def _keep(call: BiasedAttention) -> Tensor | None:
    """Return the dropout factors of the probabilities, [B, H, L, M]."""
    return draw_keep(call.q, call.k, call.seed, call.dropout_p)
