"""Padding on any side: the same loss and the same tokens, wherever a mask has its zeros.

T5's biases and the Q-Former's embeddings depend on a token's index in the row, so padding moves to the row's end. A
decoder-only model gets its positions from the mask, but the logits of the row's last index continue the text; there,
padding repeats the token before it. Being masked, the repetition has the position, the keys and the values of the token
that it repeats, and so computes the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label that the loss ignores


def padding_last(mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's padding behind its tokens, whose order is kept.

    Args:
        mask: int64 [B, L], 0 at padding.
        rows: [B, L] or [B, L, D], the tokens' ids or embeddings.

    Returns:
        The moved mask and rows.
    """
    order = mask.argsort(dim=1, descending=True, stable=True)
    return mask.gather(1, order), _taken(rows, order)


def padding_repeats(mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each row's padding by the last token before it.

    Args:
        mask, rows: as for `padding_last`.

    Returns:
        The rows, and a mask bool [B, L] of the padding before the first token, which is unchanged.
    """
    if mask.shape[1] == 0:
        return rows, mask == 0
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask != 0, index, -1).cummax(1).values
    leading = last < 0
    return _taken(rows, torch.where(leading, index, last)), leading


def _taken(rows: Tensor, order: Tensor) -> Tensor:
    return rows.gather(1, order) if rows.dim() == 2 else rows.take_along_dim(order.unsqueeze(-1), dim=1)


def shifted_right(labels: Tensor, shifted: Tensor) -> Tensor:
    """Return an encoder-decoder's inputs for labels that may be padded on any side.

    Args:
        labels: int64 [B, Lt], `IGNORED` at padding.
        shifted: int64 [B, Lt], the inputs for labels that are padded on the right.

    Returns:
        int64 [B, Lt]: at each target, the target before it, or the start token if there is none.
    """
    is_target = labels != IGNORED
    before, leading = padding_repeats(is_target, labels)
    start = shifted[:, :1]
    before = torch.where(F.pad(leading, (1, -1), value=True), start, F.pad(before, (1, -1)))
    return torch.where(is_target, before, shifted)
