"""Tests of `rms_norm` beyond `test_contract.py`: T5LayerNorm's rounding, and cost."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lion_fast.check import cases
from lion_kernels.rms_norm import cost, rms_norm
from tests.kernels.contract import make

EPS = 1e-6
CASE = cases.rms_norm((33,), 176)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_rounds_where_t5_rounds(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """In half precision, one rounding more or less would change a quarter of the values."""
    norm = T5LayerNorm(176, EPS)
    inputs = make(CASE)
    norm.weight.data = inputs["weight"].detach().to(weight_dtype)
    norm, x = norm.to(device), inputs["x"].detach().to(device, x_dtype)
    with torch.no_grad():
        expected = norm(x)
        got = rms_norm(x, norm.weight, EPS, backend=backend)
    assert got.dtype == expected.dtype == weight_dtype
    if weight_dtype == torch.float16:
        # The order of sums differs, which shows only where a normalised value lies midway between two numbers.
        assert (got != expected).float().mean() < 0.005
    torch.testing.assert_close(got, expected)


def test_torch_backend_is_t5_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = make(CASE, dtype)
        norm = T5LayerNorm(176, EPS)
        norm.weight = torch.nn.Parameter(inputs["weight"].detach())
        assert torch.equal(rms_norm(**inputs, eps=EPS, backend="torch"), norm(inputs["x"]))


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16384, 2048, torch.bfloat16)
    tensor, weight, rstd = 2 * 16384 * 2048, 2 * 2048, 4 * 16384
    assert forward.bytes == 2 * tensor + weight
    assert backward.bytes == 3 * tensor + 2 * weight + rstd
