"""Attention with a matrix of scores in PyTorch: the CPU's implementation, and the definition of dropout and padding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core.dropout import keeps


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
    """Return the dropout factors of the probabilities: 0 or 1 / (1 - dropout_p), [B, H, L, M] in fp32.

    Key j of query i, head h, batch element b and map s uses word j % 4 of the counter (j // 4, i, b * H + h, s); see
    `lion_kernels.core.dropout`.
    """

    def count(number: int, dim: int) -> Tensor:
        return torch.arange(number, device=device).view([-1 if i == dim else 1 for i in range(3)])

    counter = (count((keys + 3) // 4, 2), count(queries, 1), count(batch * heads, 0), count(1, 0) + map_index)
    keep = keeps(seed, counter, dropout_p)  # [B * H, L, M / 4, 4]
    return keep.flatten(-2)[..., :keys].unflatten(0, (batch, heads)).float() / (1.0 - dropout_p)


def draw_keep(q: Tensor, k: Tensor, seed: Tensor | None, dropout_p: float, map_index: int = 0) -> Tensor | None:
    """Return `dropout_mask` for queries q and keys k; None without a seed."""
    if seed is None:
        return None
    batch, length, heads, _ = q.shape
    return dropout_mask(batch, heads, length, k.shape[1], dropout_p, seed, map_index=map_index, device=q.device)


class Terms(NamedTuple):
    """The operands of attention besides q, k and v.

    Attributes:
        scale: factor of the scores.
        bias: added to the scores, broadcastable to [B, H, L, M].
        visible: bool, broadcastable likewise; which scores count.
        keep: [B, H, L, M], factors of the probabilities.
    """

    scale: float
    bias: Tensor | None
    visible: Tensor | None
    keep: Tensor | None


def library_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, visible: Tensor | None, scale: float
) -> Tensor:
    """Return the output of `plain_attention`, computed by PyTorch's SDPA and differentiable by autograd.

    SDPA leaves rows without visible keys undefined; such rows attend all keys here, and their output is set to zero.
    """
    attends = None if visible is None else visible.any(-1, keepdim=True)
    mask = visible
    if visible is not None and attends is not None:
        mask = visible | ~attends
    if bias is not None:
        bias = bias.to(q.dtype).unsqueeze(0)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return (out if attends is None else out.masked_fill(~attends, 0.0)).transpose(1, 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return the output [B, L, H, Dh] and lse [B, H, L], by the formula with its matrix of scores."""
    p, lse = _plain_probabilities(q, k, terms, None)
    weights = p if terms.keep is None else p * terms.keep.to(p.dtype)
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2).contiguous(), lse


def plain_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Terms,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the gradients of q, k and v (contiguous; empty if `needs` excludes one), ds and delta [B, H, L]."""
    scale, keep = terms.scale, terms.keep
    p, _ = _plain_probabilities(q, k, terms, lse)
    g = grad.transpose(1, 2).to(p.dtype)
    delta = (g * out.transpose(1, 2)).sum(-1)
    dp = g @ v.transpose(1, 2).transpose(-1, -2).to(p.dtype)
    weights = p
    if keep is not None:
        dp, weights = dp * keep.to(p.dtype), p * keep.to(p.dtype)
    ds = p * (dp - delta.unsqueeze(-1))
    gradients = [
        scale * (ds @ k.transpose(1, 2).to(p.dtype)) if needs[0] else None,
        scale * (ds.transpose(-1, -2) @ q.transpose(1, 2).to(p.dtype)) if needs[1] else None,
        weights.transpose(-1, -2) @ g if needs[2] else None,
    ]
    return [q.new_empty(0) if x is None else x.transpose(1, 2).to(q.dtype).contiguous() for x in gradients], ds, delta


def _plain_probabilities(q: Tensor, k: Tensor, terms: Terms, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    scale, bias, visible, _ = terms
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
