"""The language model's input: the visual prefix, then the text's embeddings with the soft prompt inserted."""

import torch
from torch import Tensor


def assemble_inputs(
    prefix: Tensor, input_ids: Tensor, embedding: Tensor, soft_prompt: Tensor, soft_prompt_id: int
) -> Tensor:
    """Concatenate the prefix and the text's embeddings, in which `soft_prompt` replaces the token `soft_prompt_id`.

    Args:
        prefix: [B, P, D].
        input_ids: [B, L] integers.
        embedding: [vocabulary, D].
        soft_prompt: [D].

    Returns: [B, P + L, D].
    """
    text = embedding[input_ids]
    is_soft_prompt = (input_ids == soft_prompt_id).unsqueeze(-1)
    return torch.cat([prefix, torch.where(is_soft_prompt, soft_prompt, text)], dim=1)
