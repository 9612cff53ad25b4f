"""Tests of `residual_layer_norm` beyond `test_contract.py`: the dropout mask, saved tensors and cost."""

import sys
from typing import Any

import pytest
import torch

from lion_fast.check import cases
from lion_kernels.residual_layer_norm import cost, dropout_mask, launch_forward, residual_layer_norm
from tests.kernels.contract import make

pytestmark = pytest.mark.usefixtures("poison")
MODULE = sys.modules["lion_kernels.residual_layer_norm"]
EPS = 1e-12
DROPOUT: dict[str, Any] = {"dropout_p": 0.25, "seed": -(2**40) - 12345}


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


def test_without_gradients_nothing_is_saved(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(cases.layer_norm((17,), 48), device=device)
    trained = residual_layer_norm(**inputs, eps=EPS, **DROPOUT, backend="triton")
    calls = []

    def watch(*args: Any, statistics: bool) -> Any:
        calls.append(statistics)
        return launch_forward(*args, statistics=statistics)

    monkeypatch.setattr(MODULE, "launch_forward", watch)
    with torch.no_grad():
        assert torch.equal(residual_layer_norm(**inputs, eps=EPS, **DROPOUT, backend="triton"), trained)
    frozen = {name: value.detach() for name, value in inputs.items()}
    assert torch.equal(residual_layer_norm(**frozen, eps=EPS, **DROPOUT, backend="triton"), trained)
    assert calls == [False, False]


def test_cost_counts_what_moves() -> None:
    tensor, channels, statistics = 2 * 16384 * 1408, 2 * 1408, 2 * 4 * 16384
    forward, backward = cost(16384, 1408, torch.bfloat16)
    assert forward.bytes == 3 * tensor + 3 * channels
    assert backward.bytes == 4 * tensor + 5 * channels + statistics
    forward, backward = cost(16384, 1408, torch.bfloat16, dropout=True)
    assert forward.bytes == 3 * tensor + 3 * channels
    assert backward.bytes == 5 * tensor + 5 * channels + statistics


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    row = torch.randn(4096, device=device, dtype=torch.bfloat16)
    x = row.expand(2**19 + 3, 4096).contiguous().requires_grad_()
    out = residual_layer_norm(x, x, row, row, EPS, backend="triton")
    assert torch.equal(out[-1], out[0])
    (dx,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(dx[-1], dx[0])
