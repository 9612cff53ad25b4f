"""Tests of `residual_layer_norm` beyond `test_contract.py`: the dropout mask, and cost."""

import torch

from lion_kernels.residual_layer_norm import cost, dropout_mask


def test_the_mask_is_philox() -> None:
    """Compare with the generator's published answer (Random123's known-answer tests) for key 0 and counter 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for p in (0.1, 0.39, 0.41, 0.6, 0.61, 0.73, 0.74, 0.87, 0.89, 0.99):
        kept = [word / 2**32 >= p for word in words]
        torch.testing.assert_close(dropout_mask((1, 4), p, 0), torch.tensor([kept]) / (1 - p))


def test_the_mask_drops_a_share_of_p_independently() -> None:
    """Check all values, neighbouring columns and rows, and two seeds, within 5 standard deviations."""
    shape, n = (512, 1003), 512 * 1003
    for p in (0.1, 0.5, 0.9):
        dropped, other = (dropout_mask(shape, p, seed) == 0 for seed in (7, 8))
        assert abs(dropped.double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
        for both in (dropped & other, dropped & dropped.roll(1, 0), dropped & dropped.roll(1, 1)):
            assert abs(both.double().mean() - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5
    assert torch.equal(dropout_mask((3, 4, 5), 0.5, 7).flatten(), dropout_mask((12, 5), 0.5, 7).flatten())


def test_cost_counts_what_moves() -> None:
    tensor, channels, statistics = 2 * 16384 * 1408, 2 * 1408, 2 * 4 * 16384
    forward, backward = cost(16384, 1408, torch.bfloat16)
    assert forward.bytes == 3 * tensor + 3 * channels
    assert backward.bytes == 4 * tensor + 5 * channels + statistics
    forward, backward = cost(16384, 1408, torch.bfloat16, dropout=True)
    assert forward.bytes == 3 * tensor + 3 * channels
    assert backward.bytes == 5 * tensor + 5 * channels + statistics
