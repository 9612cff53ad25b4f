"""Fixtures shared by all tests; without a GPU, the kernels run in Triton's interpreter."""

import gc
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
from tests.interpreter import (
    describe_types_once,
    patch_the_language_once,
    skip_needless_conversions,
    skip_the_overflow_check,
)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lion_kernels.core.backend import interpreting

if interpreting():
    patch_the_language_once()
    describe_types_once()
    skip_needless_conversions()
    skip_the_overflow_check()

# No deadline for examples: their time depends on the machine, not on the code.
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


def pytest_collection_finish() -> None:
    """Exclude the imported libraries from garbage collection, which the interpreter's many objects start often."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # so that objects are freed at exit


def pytest_runtest_logfinish() -> None:
    """Exit an xdist worker whose GPU accepts no more work, so that xdist replaces it.

    After a fault or a failed graph capture, the worker's later tests would fail for that reason alone.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the GPU takes no more work from this process: {error}", file=sys.stderr)
            os._exit(9)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With -v, print the golden model's errors in this process and their bounds in `tests/rounding.py`."""
    if rounding.nearest and config.get_verbosity() > 0:
        terminalreporter.section("rounding")
        for name, (error, bound) in sorted(rounding.nearest.items()):
            terminalreporter.line(f"{name:<22} {error:.1e} of {bound:.1e}")


@pytest.fixture
def golden_threads() -> Iterator[None]:
    """Use two threads, as the golden data's run did: threads split the sums of gradients over rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rounds_as_golden(golden_threads: None) -> bool:
    """Whether this machine splits and rounds sums like the one that computed the golden data.

    BLAS and torch choose their kernels by the CPU. A digest of plain operators at the golden model's sizes tells the
    machines apart, without the code under test.
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
    """The directory of the original model's results: `LION_GOLDEN_DIR`, or `shared/golden` beside the repository.

    Without it, tests that need it are skipped; in CI they fail.
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
    """The golden model in the original's files: the arguments of `convert_checkpoint` and `from_checkpoint_files`."""
    names = {"vit": "eva_vit_tiny.pth", "llm": "flan-t5-tiny", "bert": "bert-tiny", "lion": "LION-tiny.pth"}
    return {argument: golden_dir / "lion_tiny" / name for argument, name in names.items()}
