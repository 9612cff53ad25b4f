"""RMS norm, T5's layer norm: no mean, no bias (Zhang and Sennrich, arXiv 1910.07467).

out = x / sqrt(mean(x^2) + eps) * weight
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D]."""
    return F.rms_norm(x, weight.shape, weight, eps)
