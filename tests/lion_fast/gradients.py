"""Gradients and training steps of small models, and the comparison of results computed in two ways."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lion_fast import LionForCausalLM
from tests.rounding import OPERATOR_FP32

# Gradients that are zero except for rounding: a key bias shifts all scores of a query equally, which softmax cancels.
WITHOUT_INFLUENCE = (".key.bias",)

Results = tuple[Tensor, dict[str, Tensor]]
"""An output, and a copy of each gradient by parameter name."""


def copied_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of each gradient by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_of(model: LionForCausalLM, batch: dict[str, Tensor]) -> Results:
    """Return the loss and the gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), copied_gradients(model)


def train(model: nn.Module, batches: Iterable[dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> list[float]:
    """Take an optimizer step on each batch and return the loss before each."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def expect_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare each gradient to 3e-4 of its norm, and those of parameters without influence to 1e-6 of the largest norm.

    The models are small and in fp32. The largest measured rounding is 5e-5, with an aggregator, whose first layer norm
    magnifies the rounding of the vision tower (`tests/rounding.py`). The gradient of a single number, such as an
    adapter's scale, is a sum that may cancel: relative to the largest such gradient, it may also err by what a kernel
    may. A third of that was measured.
    """
    assert got.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    numbers = [gradient.abs() for gradient in expected.values() if gradient.numel() == 1]
    for name, gradient in expected.items():
        bound = 1e-6 * largest if name.endswith(WITHOUT_INFLUENCE) else 3e-4 * gradient.norm()
        if gradient.numel() == 1:
            bound = max(bound, OPERATOR_FP32 * max(numbers))
        error = (got[name] - gradient).norm()
        assert error <= bound, f"{name}: {error}, expected at most {bound}"


def expect_near(got: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Expect an error of at most `share` of the norm."""
    assert got.shape == expected.shape
    assert (got - expected).norm() <= share * expected.norm()


def expect_same(got: Results, expected: Results) -> None:
    expect_near(got[0], expected[0])
    expect_same_gradients(got[1], expected[1])


def expect_same_bits(got: Results, expected: Results) -> None:
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
