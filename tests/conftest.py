"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The directory of what the original model computed, from `LION_GOLDEN_DIR` or beside the repository.

    Tests that need it are skipped where it is absent, except in CI, where its absence is a failure.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
    path = Path(os.environ.get("LION_GOLDEN_DIR", beside))
    if not path.is_dir():
        reason = f"no golden data at {path}; set LION_GOLDEN_DIR"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
