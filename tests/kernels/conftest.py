"""Fixtures for kernels, on the GPU where there is one, else in Triton's interpreter (see tests/conftest.py)."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lion_fast.check.compare import poisoned_memory


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Several processes test on one GPU, and what one keeps for itself the others lack."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """Memory that is handed out uninitialised holds NaN, so that what nobody writes shows.

    A patch of `torch.empty` would stay behind in what `torch.compile` remembers of it, and with that
    `torch.device("meta")` allocates real memory in later tests.
    """
    with poisoned_memory():
        assert torch.empty(1).isnan().all()
        yield
