"""Multi-scale attention against loops over queries, keys and heads, in fp64."""

import pytest
import torch
from torch import Tensor

from lion_reference import multi_scale_attention
from tests.reference import loops
from tests.reference.loops import randn

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 3, 2, 5
LENGTHS = (4, 1, 6)


@pytest.fixture
def q() -> Tensor:
    return randn(0, BATCH, LENGTH, HEADS, HEAD_DIM)


@pytest.fixture
def keys() -> list[Tensor]:
    return [randn(1, BATCH, length, HEADS, HEAD_DIM) for length in LENGTHS]


@pytest.fixture
def values() -> list[Tensor]:
    return [randn(2, BATCH, length, HEADS, HEAD_DIM) for length in LENGTHS]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return loops.attention(
        q,
        k,
        v,
        lambda b, i, j, h: scale * (q[b, i, h] @ k[b, j, h]),
        lambda b, i, j: mask is None or bool(mask[b, j]),
    )


def test_every_map_has_its_own_softmax(q, keys, values):
    out = multi_scale_attention(q, keys, values)
    assert out.shape == (BATCH, LENGTH, len(LENGTHS), HEADS, HEAD_DIM)
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        torch.testing.assert_close(out[:, :, s], attention(q, k, v, HEAD_DIM**-0.5))


def test_scale_gate_sums_over_the_maps(q, keys, values):
    gate = randn(3, 3)
    out = multi_scale_attention(q, keys, values, scale=0.7, scale_gate=gate)
    wanted = sum(g * attention(q, k, v, 0.7) for g, k, v in zip(gate, keys, values, strict=True))
    torch.testing.assert_close(out, wanted)


def test_one_map_has_no_scale_dimension(q, keys, values):
    out = multi_scale_attention(q, keys[:1], values[:1])
    torch.testing.assert_close(out, attention(q, keys[0], values[0], HEAD_DIM**-0.5))


def test_masks_hide_keys(q, keys, values):
    masks = [torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]), None, torch.tensor([[1, 0, 0, 0, 0, 0]] * 2)]
    out = multi_scale_attention(q, keys, values, key_padding_mask=masks)
    for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        torch.testing.assert_close(out[:, :, s], attention(q, k, v, HEAD_DIM**-0.5, mask))
    assert (out[1, :, 0] == 0).all()


def test_fully_masked_rows_have_finite_gradients(q, keys, values):
    q.requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])
    multi_scale_attention(q, keys[:1], values[:1], key_padding_mask=mask).sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert (q.grad[1] == 0).all()


def test_dropout_mask_multiplies_the_probabilities(q, keys, values):
    keep = torch.zeros(BATCH, HEADS, LENGTH, 4, dtype=torch.float64)
    keep[..., 2] = 2.0
    out = multi_scale_attention(q, keys[:1], values[:1], dropout_mask=[keep])
    only = values[0].clone()
    only[:, [0, 1, 3]] = 0
    torch.testing.assert_close(out, 2 * attention(q, keys[0], only, HEAD_DIM**-0.5))


def test_there_is_a_dropout_mask_for_each_map(q, keys, values):
    with pytest.raises(ValueError, match=r"dropout_mask: expected 3 .*got 1"):
        multi_scale_attention(q, keys, values, dropout_mask=[torch.ones(1)])
