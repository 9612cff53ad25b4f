"""Fixtures for the kernels' tests, on the GPU if there is one, else in Triton's interpreter (tests/conftest.py)."""

from collections.abc import Iterator

import pytest
import torch

from lion_fast.check.compare import poisoned_memory


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Release cached memory: several test processes share one GPU."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a value that was never written shows.

    `torch.compile` would remember a patch of `torch.empty`, and with it `torch.device("meta")` would allocate real
    memory in later tests.
    """
    with poisoned_memory():
        assert torch.empty(1).isnan().all()
        yield
