"""T5's attention: no scale, and a learned bias by head and bucketed distance (Raffel et al., arXiv 1910.10683).

out = softmax(q k^T + bias_table[bucket(key position - query position)]) v
"""

import math

import torch
from einops import einsum, rearrange
from torch import Tensor

from .multi_scale_attention import attention_probabilities


def relative_position_bucket(distance: Tensor, *, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Return the bucket of each distance (key position - query position, integers of any shape).

    Half of the buckets hold one distance each. The other half divides the distances up to `max_distance` evenly on a
    logarithmic scale; its last bucket also holds all larger distances. If bidirectional, keys at or before the query
    have one such series of buckets and keys after it have another. Otherwise, keys after the query have bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        first = torch.zeros_like(distance)
        distance = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    # fp32 whatever the model's dtype: the published weights were trained with these bucket boundaries.
    position = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (position * (num_buckets - num_exact)).long()
    return first + torch.where(distance < num_exact, distance, logarithmic.clamp(max=num_buckets - 1))


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
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Compute multi-head self-attention with T5's relative position bias.

    Args:
        q: [B, L, H, Dh], the last L of the M positions of k.
        k, v: [B, M, H, Dh], M >= L.
        bias_table: [num_buckets, H].
        key_padding_mask: [B, M], nonzero where a key may be attended.
        bidirectional: whether keys before and after the query have separate buckets.
        max_distance: distance from which all distances share a bucket.
        causal: whether a query may attend only to keys up to its own position.
        dropout_mask: [B, H, L, M], multiplies the probabilities (0 or 1 / (1 - p)).

    Returns: [B, L, H, Dh]; zero for a query that may attend to no key.
    Raises ValueError if a shape does not match.
    """
    batch, length, heads, head_dim = q.shape
    if k.shape != (batch, k.shape[1], heads, head_dim) or k.shape[1] < length:
        raise ValueError(f"k: expected {[batch, f'M >= {length}', heads, head_dim]} (from q), got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected {list(k.shape)} (from k), got {list(v.shape)}")
    if bias_table.ndim != 2 or bias_table.shape[1] != heads:
        raise ValueError(f"bias_table: expected [num_buckets, {heads}] (H from q), got {list(bias_table.shape)}")
    if key_padding_mask is not None and key_padding_mask.shape != k.shape[:2]:
        raise ValueError(f"key_padding_mask: expected {list(k.shape[:2])} (from k), got {list(key_padding_mask.shape)}")
    key_positions = torch.arange(k.shape[1], device=q.device)
    distance = key_positions[None, :] - key_positions[k.shape[1] - length :, None]  # [L, M]
    buckets = relative_position_bucket(
        distance, num_buckets=bias_table.shape[0], max_distance=max_distance, bidirectional=bidirectional
    )
    bias = rearrange(bias_table[buckets], "l m h -> h l m")
    scores = einsum(q, k, "b l h d, b m h d -> b h l m") + bias

    mask = torch.ones_like(distance, dtype=torch.bool)[None, None]
    if causal:
        mask = mask & (distance <= 0)
    if key_padding_mask is not None:
        mask = mask & key_padding_mask.bool()[:, None, None, :]
    probabilities = attention_probabilities(scores, mask)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask
    return einsum(probabilities, v, "b h l m, b m h d -> b l h d")
