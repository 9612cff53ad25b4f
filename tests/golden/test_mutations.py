"""The comparison fails if a name, a scale or a gate is wrong, in either implementation."""

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lion_fast.conversion.lion
import lion_reference.lion
from lion_fast.model.adapters import MixtureOfAdapters
from lion_reference.mixture_of_adapters import Adapter
from tests.golden.comparison import expect_close
from tests.golden.computing import forward_and_backward
from tests.golden.data import Golden
from tests.golden.subjects import convert, float64_throughout, load_lion_fast, load_reference

pytestmark = pytest.mark.parametrize("golden", ["all"], indirect=True)  # the model with all parts

Mutation = Callable[[pytest.MonkeyPatch], None]
SLIGHTLY = 1 + 1e-6  # a difference that is hardly visible in float32


def swap_two_norms_in_the_name_map(patch: pytest.MonkeyPatch) -> None:
    names = lion_fast.conversion.lion._LION_NAMES
    patch.setitem(names, "vision_layernorm", "ln_adapter")
    patch.setitem(names, "aggregator_layernorm", "ln_vision")


def swap_the_routers_names(patch: pytest.MonkeyPatch) -> None:
    origins = lion_fast.conversion.lion._origins

    def swapped(name: str) -> list[tuple[str, str]]:
        return origins(re.sub(r"(?<=router_ratio)[12]$", lambda found: "21"[int(found[0]) - 1], name))

    patch.setattr(lion_fast.conversion.lion, "_origins", swapped)


def fold_a_wrong_scale(patch: pytest.MonkeyPatch) -> None:
    gate = MixtureOfAdapters.gate
    patch.setattr(MixtureOfAdapters, "gate", lambda self, scales: gate(self, scales * SLIGHTLY))


def swap_the_gate_s_rows(patch: pytest.MonkeyPatch) -> None:
    gate = MixtureOfAdapters.gate
    patch.setattr(MixtureOfAdapters, "gate", lambda self, scales: gate(self, scales).flip(0))


def read_two_norms_swapped(patch: pytest.MonkeyPatch) -> None:
    read = lion_reference.lion.read_checkpoint_files

    def swapped(**files: Any) -> tuple[Any, dict[str, Tensor]]:
        config, state = read(**files)
        one, other = "ln_vision.weight", "ln_adapter.weight"
        return config, {**state, one: state[other], other: state[one]}

    patch.setattr(lion_reference.lion, "read_checkpoint_files", swapped)


def multiply_by_a_wrong_scale(patch: pytest.MonkeyPatch) -> None:
    forward = Adapter.forward
    patch.setattr(Adapter, "forward", lambda self, x: forward(self, x) * SLIGHTLY)


def expand_the_gate_with_its_rows_swapped(patch: pytest.MonkeyPatch) -> None:
    module = import_module("lion_reference.mixture_of_adapters")  # the package has a function of the same name
    expand = module.expand_gate
    patch.setattr(module, "expand_gate", lambda gate, *args, **settings: expand(gate.flip(0), *args, **settings))


LION_FAST: list[Mutation] = [
    swap_two_norms_in_the_name_map,
    swap_the_routers_names,
    fold_a_wrong_scale,
    swap_the_gate_s_rows,
]
REFERENCE: list[Mutation] = [
    read_two_norms_swapped,
    multiply_by_a_wrong_scale,
    expand_the_gate_with_its_rows_swapped,
]
FAILURE = r"\d+ of \d+ results are not the original's"


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with float64_throughout():
        yield


@pytest.mark.parametrize("mutation", LION_FAST, ids=lambda mutation: mutation.__name__)
def test_lion_fast(
    mutation: Mutation, golden: Golden, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    subject = load_lion_fast(golden, convert(files, tmp_path / "lion"), torch.float64)
    results = forward_and_backward(subject, torch.float64)
    with pytest.raises(AssertionError, match=FAILURE):
        expect_close(golden, results, torch.float64)


@pytest.mark.parametrize("mutation", REFERENCE, ids=lambda mutation: mutation.__name__)
def test_reference(mutation: Mutation, golden: Golden, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    results = forward_and_backward(load_reference(golden, files), torch.float64)
    with pytest.raises(AssertionError, match=FAILURE):
        expect_close(golden, results, torch.float64)
