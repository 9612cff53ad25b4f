"""Tests of `gated_gelu` beyond `test_contract.py`: overflow, saved tensors, checkpointing and cost."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_fast.check import cases
from lion_kernels.gated_gelu import cost, gated_gelu
from tests.kernels.contract import expect_equal, make, reference, run

pytestmark = pytest.mark.usefixtures("poison")
CASE = cases.gated_gelu((17,), 48)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_torch_backend(dtype: torch.dtype) -> None:
    tensors = make(CASE, dtype)
    expect_equal(run(CASE, tensors, "torch"), reference(CASE, tensors, dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy squares the gate
def test_far_from_zero(device: torch.device) -> None:
    """Nothing overflows where the GELU is the identity or zero."""
    gate = torch.tensor([-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e30], device=device, requires_grad=True)
    out = gated_gelu(gate, torch.ones_like(gate), backend="triton")
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    assert out.tolist() == [0, 0, 0, 0, 20, 100, gate[-1].item()]
    assert dgate.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_backward_saves_the_inputs_alone(device: torch.device) -> None:
    inputs = make(CASE, device=device)
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_gelu(**inputs, backend="triton")
    assert [tensor.data_ptr() for tensor in saved] == [value.data_ptr() for value in inputs.values()]


def test_a_checkpoint_recomputes_it_but_not_the_product_after_it(device: torch.device) -> None:
    """As documented, the input of a trained linear layer is not saved."""
    gate, up = make(CASE, device=device).values()
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
