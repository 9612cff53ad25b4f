"""Fixtures for kernels, on the GPU where there is one, else in Triton's interpreter (see tests/conftest.py)."""

from collections.abc import Callable

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
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out uninitialised holds NaN (integers: the largest), so that what nobody writes shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "meta" or tensor.dtype == torch.bool:
                return tensor
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
