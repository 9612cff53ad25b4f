"""Comparison of a model's gradients, computed in two ways."""

from torch import Tensor

# Gradients that are zero except for rounding: a key bias shifts all scores of a query equally, which softmax cancels.
WITHOUT_INFLUENCE = (".key.bias",)


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
