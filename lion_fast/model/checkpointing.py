"""Gradient checkpointing of blocks whose input needs no gradient, as in a frozen tower with LoRA.

A reentrant checkpoint (`use_reentrant=True`, and the default of PEFT's `prepare_model_for_kbit_training`) computes
gradients of the parameters inside only if one of its arguments requires a gradient. Otherwise they stay None, silently.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def with_gradient(hidden_states: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
    """Return the input of `blocks`, requiring a gradient if a reentrant checkpoint of theirs needs it to.

    Args:
        hidden_states: the first block's input, any floating tensor; it is not changed.
        blocks: the blocks that it flows through.
    """
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return hidden_states
    blocks = list(blocks)
    if not any(block.training and _is_reentrant(block) for block in blocks):
        return hidden_states
    trains = any(parameter.requires_grad for block in blocks for parameter in block.parameters())
    return hidden_states.detach().requires_grad_() if trains else hidden_states


def _is_reentrant(block: nn.Module) -> bool:
    """Return whether transformers checkpoints the block, and not with `use_reentrant=False`."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)  # a partial function of PyTorch's
    return getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False
