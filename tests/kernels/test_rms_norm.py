"""Tests of `rms_norm` beyond `test_contract.py`: T5LayerNorm's rounding, saved tensors and cost."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lion_kernels.rms_norm import cost, launch_forward, rms_norm

pytestmark = pytest.mark.usefixtures("poison")
MODULE = sys.modules["lion_kernels.rms_norm"]
EPS = 1e-6


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the same values in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    values = {"x": torch.randn(shape, generator=generator) * 3, "weight": torch.randn(shape[-1], generator=generator)}
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_rounds_where_t5_rounds(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """In half precision, one rounding more or less would change a quarter of the values."""
    norm = T5LayerNorm(176, EPS)
    inputs = make_inputs((33, 176), torch.float32)
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
        inputs = make_inputs((33, 176), dtype)
        norm = T5LayerNorm(176, EPS)
        norm.weight = torch.nn.Parameter(inputs["weight"].detach())
        assert torch.equal(rms_norm(**inputs, eps=EPS, backend="torch"), norm(inputs["x"]))


def test_without_gradients_nothing_is_saved(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((17, 176), torch.float32, device)
    trained = rms_norm(**inputs, eps=EPS, backend="triton")
    calls = []

    def watch(*args: Any, statistics: bool) -> Any:
        calls.append(statistics)
        return launch_forward(*args, statistics=statistics)

    monkeypatch.setattr(MODULE, "launch_forward", watch)
    with torch.no_grad():
        assert torch.equal(rms_norm(**inputs, eps=EPS, backend="triton"), trained)
    frozen = {name: value.detach() for name, value in inputs.items()}
    assert torch.equal(rms_norm(**frozen, eps=EPS, backend="triton"), trained)
    assert calls == [False, False]


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16384, 2048, torch.bfloat16)
    tensor, weight, rstd = 2 * 16384 * 2048, 2 * 2048, 4 * 16384
    assert forward.bytes == 2 * tensor + weight
    assert backward.bytes == 3 * tensor + 2 * weight + rstd


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    x = torch.randn(1, 4096, device=device, dtype=torch.bfloat16).expand(2**19 + 3, 4096).contiguous().requires_grad_()
    weight = torch.randn(4096, device=device, dtype=torch.bfloat16)
    out = rms_norm(x, weight, EPS, backend="triton")
    assert torch.equal(out[-1], out[0])
    (dx,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(dx[-1], dx[0])
