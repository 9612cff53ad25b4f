"""Attention from one set of queries to several feature maps, one softmax per map (LION, arXiv 2311.11860).

out_s = softmax(scale * q k_s^T) v_s
"""

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor


def attention_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension of scores where mask (bool, broadcastable) is true, zero elsewhere.

    A row whose mask is all false gives zeros.
    """
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0)


def multi_scale_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | Sequence[Tensor | None] | None = None,
    scale_gate: Tensor | None = None,
    dropout_mask: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute multi-head attention to S feature maps, with one softmax per map.

    Args:
        q: [B, L, H, Dh].
        keys, values: S tensors [B, L_s, H, Dh] each; the lengths L_s may differ.
        scale: factor of the scores, Dh^-0.5 by default.
        key_padding_mask: [B, L_s], nonzero where a key may be attended; one for all maps, or one (or None) per map.
        scale_gate: [S], weights of a sum over the maps.
        dropout_mask: S tensors [B, H, L, L_s] that multiply the probabilities (0 or 1 / (1 - p)).

    Returns: [B, L, S, H, Dh]; [B, L, H, Dh] with a `scale_gate` or if S = 1. The output of a map is zero for a query
    that may attend to none of its keys.
    Raises ValueError if a shape does not match.
    """
    if not keys or len(keys) != len(values):
        raise ValueError(f"values: expected one per feature map of keys, got {len(values)} for {len(keys)} keys")
    batch, _, heads, head_dim = q.shape
    if key_padding_mask is None or isinstance(key_padding_mask, Tensor):
        key_padding_mask = [key_padding_mask] * len(keys)
    if len(key_padding_mask) != len(keys):
        raise ValueError(f"key_padding_mask: expected {len(keys)} (from keys), got {len(key_padding_mask)}")
    if scale_gate is not None and scale_gate.shape != (len(keys),):
        raise ValueError(f"scale_gate: expected {[len(keys)]} (from keys), got {list(scale_gate.shape)}")
    if dropout_mask is not None and len(dropout_mask) != len(keys):
        raise ValueError(f"dropout_mask: expected {len(keys)} (from keys), got {len(dropout_mask)}")
    q = q * (head_dim**-0.5 if scale is None else scale)

    outputs = []
    for s, (k, v, mask) in enumerate(zip(keys, values, key_padding_mask, strict=True)):
        if k.shape != (batch, k.shape[1], heads, head_dim):
            raise ValueError(f"keys[{s}]: expected {[batch, 'L_s', heads, head_dim]} (from q), got {list(k.shape)}")
        if v.shape != k.shape:
            raise ValueError(f"values[{s}]: expected {list(k.shape)} (from keys[{s}]), got {list(v.shape)}")
        if mask is not None and mask.shape != k.shape[:2]:
            raise ValueError(f"key_padding_mask: expected {list(k.shape[:2])} for keys[{s}], got {list(mask.shape)}")
        scores = einsum(q, k, "b l h d, b m h d -> b h l m")
        if mask is None:
            probabilities = scores.softmax(-1)
        else:
            probabilities = attention_probabilities(scores, mask.bool()[:, None, None, :])
        if dropout_mask is not None:
            probabilities = probabilities * dropout_mask[s]
        outputs.append(einsum(probabilities, v, "b h l m, b m h d -> b l h d"))

    if scale_gate is not None:
        return einsum(torch.stack(outputs), scale_gate, "s b l h d, s -> b l h d")
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs, dim=2)
