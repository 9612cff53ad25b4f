"""Properties of the ViT that the golden data does not cover."""

import math

import pytest
import torch
from torch import Tensor

from lion_reference import LION
from lion_reference.vit import resize_pos_embed


def bicubic_matrix(old: int, new: int) -> Tensor:
    """Return [new, old]: Keys' cubic weights (a = -0.75) at the centres of the new cells, with a repeated border."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for n in range(new):
        centre = (n + 0.5) * old / new - 0.5
        for m in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - m)
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[n, min(max(m, 0), old - 1)] += near if d <= 1 else far
    return weights


@pytest.mark.parametrize("new", [4, 5, 7])
def test_position_embeddings_are_resized_by_bicubic_interpolation(new):
    pos_embed = torch.randn(1, 1 + 4 * 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resized = resize_pos_embed(pos_embed, new)
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    weights = bicubic_matrix(4, new)
    for d in range(3):
        wanted = weights @ pos_embed[0, 1:, d].reshape(4, 4) @ weights.T
        torch.testing.assert_close(resized[0, 1:, d].reshape(new, new), wanted)


def test_another_image_size_is_refused(model: LION):
    with pytest.raises(ValueError, match=r"pixel_values: expected \['B', 3, 56, 56\], got \[1, 3, 70, 70\]"):
        model.visual_encoder(torch.zeros(1, 3, 70, 70))
