"""BERT's post-norm step: bias, dropout, residual and LayerNorm (Devlin et al., arXiv 1810.04805).

out = LayerNorm(dropout(x + x_bias) + residual) * weight + bias
"""

import torch.nn.functional as F
from torch import Tensor


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """x, residual [..., D]; weight, bias, x_bias [D]; dropout_mask [..., D], 0 or 1 / (1 - p) -> [..., D].

    Raises ValueError if x and residual differ in shape.
    """
    if x.shape != residual.shape:
        raise ValueError(f"residual: expected {list(x.shape)} (from x), got {list(residual.shape)}")
    if x_bias is not None:
        x = x + x_bias
    if dropout_mask is not None:
        x = x * dropout_mask
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)
