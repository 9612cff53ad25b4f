"""Gradients and training steps of small models, and the comparison of gradients computed in two ways."""

import torch
from torch import Tensor

from lion_fast import LionForCausalLM

# Gradients that are zero except for rounding: a key bias shifts all scores of a query equally, which softmax cancels.
WITHOUT_INFLUENCE = (".key.bias",)


def gradients_of(model: LionForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and a copy of each gradient by parameter name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(
    model: LionForCausalLM, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    """Take `steps` optimizer steps on one batch and return the loss before each."""
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def expect_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare each gradient to 3e-4 of its norm, and those of parameters without influence to 1e-6 of the largest norm.

    The models are small and in fp32. The largest measured rounding is 5e-5, with an aggregator, whose first layer norm
    magnifies the rounding of the vision tower (`tests/rounding.py`).
    """
    assert got.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        bound = 1e-6 * largest if name.endswith(WITHOUT_INFLUENCE) else 3e-4 * gradient.norm()
        error = (got[name] - gradient).norm()
        assert error <= bound, f"{name}: {error}, expected at most {bound}"
