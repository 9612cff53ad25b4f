"""Fixtures for kernels, on the GPU where there is one, else in Triton's interpreter (see tests/conftest.py)."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """||got - expected|| / ||expected||, in fp64; infinite where anything is NaN."""

    def measure(got: Tensor, expected: Tensor) -> float:
        got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
        assert got.shape == expected.shape
        error = ((got - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        return error if error == error else float("inf")

    return measure


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that is handed out uninitialised holds NaN (integers: the largest), so that what nobody writes shows.

    torch fills it itself in its deterministic mode. A patch of `torch.empty` would stay behind in what
    `torch.compile` remembers of it, and with that `torch.device("meta")` allocates real memory in later tests.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
