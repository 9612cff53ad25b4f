"""What tests of the same model, computed in two ways, hold its gradients to."""

from torch import Tensor

# Of zero but for rounding: they move all scores of a query alike, which no softmax shows.
WITHOUT_INFLUENCE = (".key.bias",)


def expect_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every gradient to 3e-4 of itself; those without influence on anything to 1e-6 of the largest.

    These are small models in fp32, whose rounding left 5e-5 at the most where this was measured: with an aggregator its
    first layer norm magnifies that of the vision tower (`tests/rounding.py`).
    """
    assert got.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        bound = 1e-6 * largest if name.endswith(WITHOUT_INFLUENCE) else 3e-4 * gradient.norm()
        error = (got[name] - gradient).norm()
        assert error <= bound, f"{name}: {error}, expected {bound} at the most"
