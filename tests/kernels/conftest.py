"""Fixtures for kernels, on the GPU where there is one, else in Triton's interpreter (see tests/conftest.py)."""

from collections.abc import Iterator

import pytest
import torch

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


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that is handed out uninitialised holds NaN, so that what nobody writes shows.

    A patch of `torch.empty` would stay behind in what `torch.compile` remembers of it, and with that
    `torch.device("meta")` allocates real memory in later tests.
    """
    with poisoned_memory():
        assert torch.empty(1).isnan().all()
        yield
