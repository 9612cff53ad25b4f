"""Fixtures shared by all tests, which run the kernels in Triton's interpreter where there is no GPU."""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings

from tests import rounding
from tests.interpreter import patch_the_language_once

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lion_kernels.core.backend import interpreting

if interpreting():
    patch_the_language_once()

# An example may take as long as it takes: how long says something of the machine, and nothing of the code.
settings.register_profile(
    "any machine",
    settings(),
    deadline=None,
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.too_slow],
)
settings.load_profile("any machine")

GOLDEN_ROUNDING = "e6781661c1ed55b25b4ef867eca6570beb4b1468491fd351e89f9ef04cebc253"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logfinish() -> None:
    """Ends a process of several whose GPU takes no more work, so that xdist starts another in its place.

    After a fault, or a capture that broke, its later tests would fail for no reason of their own.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the GPU takes no more work from this process: {error}", file=sys.stderr)
            os._exit(9)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With -v, how near the golden model's results came to what `tests/rounding.py` allows (in this process)."""
    if rounding.nearest and config.get_verbosity() > 0:
        terminalreporter.section("rounding")
        for name, (error, bound) in sorted(rounding.nearest.items()):
            terminalreporter.line(f"{name:<22} {error:.1e} of {bound:.1e}")


@pytest.fixture
def golden_threads() -> Iterator[None]:
    """As many threads as computed the golden data: they split the sums of gradients over rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rounds_as_golden(golden_threads: None) -> bool:
    """Whether sums are split and rounded here as where the golden data was computed.

    BLAS and torch choose their kernels by the CPU. A digest of plain operators of the golden model's sizes tells, and
    knows nothing of the code under test.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 129, 176), (176, 176), (768, 176), (176, 768))
    leaves = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    x, projection, up, down = leaves
    heads = F.linear(x, projection).unflatten(-1, (16, 11)).transpose(1, 2)
    attended = (heads @ heads.transpose(-1, -2)).softmax(-1) @ heads
    normed = F.layer_norm(attended.transpose(1, 2).flatten(2), (176,))
    out = F.linear(F.gelu(F.linear(normed, up)), down)
    gradients = torch.autograd.grad(out.square().mean(), leaves)
    digest = hashlib.sha256()
    for tensor in (out.detach(), *gradients):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest() == GOLDEN_ROUNDING


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


@pytest.fixture(scope="session")
def golden_files(golden_dir: Path) -> dict[str, Path]:
    """The original's files of the golden model: the arguments of `convert_checkpoint` and `from_checkpoint_files`."""
    names = {"vit": "eva_vit_tiny.pth", "llm": "flan-t5-tiny", "bert": "bert-tiny", "lion": "LION-tiny.pth"}
    return {argument: golden_dir / "lion_tiny" / name for argument, name in names.items()}
