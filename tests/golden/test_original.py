"""Both implementations against the original's results, which every clone contains.

`lion_reference` runs in float64. `LionForCausalLM` is loaded with `convert_checkpoint` and `from_pretrained`, and runs
in float64 without casts to float32 (like the original's run), in float32 as users run it, and on the kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lion_kernels.core.backend import interpreting
from tests.golden.comparison import expect_close
from tests.golden.computing import forward_and_backward, golden_tokens, tokens, train, vision
from tests.golden.data import Golden
from tests.golden.subjects import Subject, float64_throughout, load_lion_fast, load_reference
from tests.interpreter import large_tiles


class Setting(NamedTuple):
    package: str
    dtype: torch.dtype


SETTINGS = {
    "reference": Setting("lion_reference", torch.float64),
    "float64": Setting("lion_fast", torch.float64),
    "float32": Setting("lion_fast", torch.float32),
}


class Loaded(NamedTuple):
    """A function that loads a new model, and the dtype the model computes in."""

    load: Callable[[], Subject]
    dtype: torch.dtype


@pytest.fixture(scope="module", params=SETTINGS)
def loaded(golden: Golden, files: dict[str, Path], converted: Path, request: pytest.FixtureRequest) -> Iterator[Loaded]:
    package, dtype = SETTINGS[request.param]

    def load() -> Subject:
        if package == "lion_reference":
            return load_reference(golden, files)
        return load_lion_fast(golden, converted, dtype)

    with ExitStack() as stack:
        if dtype == torch.float64:
            stack.enter_context(float64_throughout())
        yield Loaded(load, dtype)


@pytest.fixture(scope="module")
def subject(loaded: Loaded) -> Subject:
    return loaded.load()


def test_parameters_are_the_original_s(subject: Subject, golden: Golden) -> None:
    shapes = {name: list(parameter.shape) for name, parameter in subject.parameters.items()}
    assert shapes == golden.meta["shapes"]
    for name, parameter in subject.parameters.items():
        assert torch.equal(parameter.float(), golden.parameters[name]), name


def test_vision_and_aggregator(subject: Subject, golden: Golden, loaded: Loaded) -> None:
    expect_close(golden, vision(subject, loaded.dtype), loaded.dtype)


def test_values_and_gradients(subject: Subject, golden: Golden, loaded: Loaded) -> None:
    expect_close(golden, forward_and_backward(subject, loaded.dtype), loaded.dtype)


def test_generated_tokens(subject: Subject, golden: Golden, loaded: Loaded) -> None:
    # The scores of beam candidates differ by only 1e-8, those of greedy choices by 3e-4, ten times float32's error.
    beams = (1,) if loaded.dtype == torch.float32 else (1, 5)
    assert tokens(subject, loaded.dtype, beams) == golden_tokens(golden, beams)


def test_training_steps(golden: Golden, loaded: Loaded) -> None:
    """Compare 12 steps in float64 and 3 in float32: from the fourth on, rounding changes the loss by up to 2e-2."""
    steps = 3 if loaded.dtype == torch.float32 else 12
    expect_close(golden, train(loaded.load(), loaded.dtype, steps), loaded.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("golden", ["all"], indirect=True)
def test_the_kernels(golden: Golden, converted: Path) -> None:
    """Compare values and gradients of one task in Triton's interpreter."""
    if not interpreting():
        pytest.skip("this model is on the CPU, where kernels run in Triton's interpreter only")
    subject = load_lion_fast(golden, converted, torch.float32, kernel_backend="triton")
    with large_tiles():
        results = forward_and_backward(subject, torch.float32, ("region_level",))
    expect_close(golden, results, torch.float32)
