"""Tests of `gated_gelu` beyond `test_contract.py`: overflow, saved tensors, checkpointing and cost."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_kernels.gated_gelu import cost, gated_gelu
from lion_reference import gated_gelu as reference
from tests.kernels.gradients import Inputs, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("poison")


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """Return the same values in every dtype, up to rounding; gates are on both sides of zero."""
    generator = torch.Generator().manual_seed(0)
    values = {"gate": torch.randn(shape, generator=generator) * 2, "up": torch.randn(shape, generator=generator)}
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_torch_backend(dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 5, 176), dtype)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(gated_gelu, inputs, backend="torch").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy squares the gate
def test_far_from_zero(device: torch.device) -> None:
    """Nothing overflows where the GELU is the identity or zero."""
    gate = torch.tensor([-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e30], device=device, requires_grad=True)
    out = gated_gelu(gate, torch.ones_like(gate), backend="triton")
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    assert out.tolist() == [0, 0, 0, 0, 20, 100, gate[-1].item()]
    assert dgate.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_backward_saves_the_inputs_alone(device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_gelu(**inputs, backend="triton")
    assert [tensor.data_ptr() for tensor in saved] == [value.data_ptr() for value in inputs.values()]


def test_a_checkpoint_recomputes_it_but_not_the_product_after_it(device: torch.device) -> None:
    """As documented, the input of a trained linear layer is not saved."""
    gate, up = make_inputs((17, 48), torch.float32, device).values()
    weight = torch.randn(32, 48, device=device, requires_grad=True)
    calls, held = [], []

    def gelu_and_down(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        out = gated_gelu(gate, up, backend="triton")
        calls.append("gated_gelu")
        out = F.linear(out, weight)
        calls.append("linear")
        return out

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    expected = torch.autograd.grad(gelu_and_down(gate, up, weight).sum(), (gate, up, weight))
    calls.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out: Any = checkpoint(gelu_and_down, gate, up, weight, use_reentrant=False)
    given = {tensor.data_ptr() for tensor in (gate, up, weight)}
    assert all(tensor.numel() == 0 or tensor.data_ptr() in given for tensor in held)
    got = torch.autograd.grad(out.sum(), (gate, up, weight))
    assert calls == ["gated_gelu", "linear", "gated_gelu"]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16384, 5120, torch.bfloat16)
    tensor = 2 * 16384 * 5120
    assert forward.bytes == 3 * tensor
    assert backward.bytes == 5 * tensor


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    row = torch.randn(5120, device=device, dtype=torch.bfloat16)
    gate = row.expand(2**19, 5120).contiguous().requires_grad_()
    out = gated_gelu(gate, gate, backend="triton")
    assert torch.equal(out[-1], out[0])
    (dgate,) = torch.autograd.grad(out, gate, out.detach())
    assert torch.equal(dgate[-1], dgate[0])
