"""Attention through transformers' table of implementations (eager, sdpa, flash_attention_2, ...)."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Bidirectional attention without a mask, by the implementation that `module.config` names.

    Args:
        module: has `config` and `is_causal = False`.
        query: [B, L, H, Dh].
        key, value: [B, Lk, H, Dh].
        dropout: probability of dropping an attention weight; the caller passes 0 outside training.

    Returns:
        [B, L, H * Dh].
    """
    config: Any = module.config
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager)
    out, _ = implementation(
        module,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        dropout=dropout,
        scaling=query.shape[-1] ** -0.5,
    )
    return out.flatten(2)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    # Scaling the query first is the original's order in the vision tower, whose results this gives bit for bit.
    weights = (query * scaling @ key.transpose(-1, -2)).softmax(-1)
    dropped = nn.functional.dropout(weights, p=dropout)
    return (dropped @ value).transpose(1, 2), weights
