"""Fixtures for the golden models: stored values, checkpoints in the original's files, converted checkpoints."""

from pathlib import Path

import pytest

from tests.golden.data import NAMES, Golden, load
from tests.golden.subjects import convert


@pytest.fixture(scope="package", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load(request.param)


@pytest.fixture(scope="package")
def files(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return golden.write_checkpoint(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="package")
def converted(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(files, tmp_path_factory.mktemp("converted") / "lion")
