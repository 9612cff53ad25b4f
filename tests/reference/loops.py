"""Random tensors in fp64, and attention as loops over its definition."""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[[int, int, int, int], Tensor],
    attends: Callable[[int, int, int], bool],
) -> Tensor:
    """[B, L, H, D]: the softmax of `score(b, i, j, h)` over the keys j that query i of sample b attends to, if any."""
    out = torch.zeros_like(q)
    for b, i, h in product(*map(range, q.shape[:3])):
        attended = [j for j in range(k.shape[1]) if attends(b, i, j)]
        weights = [math.exp(score(b, i, j, h).item()) for j in attended]
        for weight, j in zip(weights, attended, strict=True):
            out[b, i, h] += weight / sum(weights) * v[b, j, h]
    return out
