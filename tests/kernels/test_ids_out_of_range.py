"""Task and expert ids out of range: they have no weight if checking them would mean waiting for the GPU.

The gate lies between NaNs in memory, so that an out-of-bounds read shows.
"""

import importlib

import pytest
import torch
from torch import Tensor

import lion_kernels
import lion_reference
from tests.kernels.gradients import Inputs, cast, outputs_and_gradients
from tests.rounding import OPERATOR_FP32, relative_error

pytestmark = pytest.mark.usefixtures("poison")
ROWS, EXPERTS, RANK, CHANNELS = 12, 3, 8, 32


def make_inputs(operator: str, gate: Tensor, ids: dict[str, Tensor]) -> Inputs:
    """Return fp64 inputs with this gate and these ids."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    down, up = randn(EXPERTS, RANK, CHANNELS), randn(EXPERTS, CHANNELS, RANK)
    inputs: Inputs = {"x": randn(ROWS, CHANNELS), "gate": gate, **ids}
    if operator == "mixture_of_lora_linear":
        return inputs | {"weight": randn(CHANNELS, CHANNELS), "bias": randn(CHANNELS), "lora_a": down, "lora_b": up}
    biases = {"down_bias": randn(EXPERTS, RANK), "up_bias": randn(EXPERTS, CHANNELS)}
    return inputs | {"down_weight": down, "up_weight": up, "residual": randn(ROWS, CHANNELS), **biases}


def amid_nans(tensor: Tensor) -> Tensor:
    """Return the same values, with as many NaNs before and after them in memory."""
    storage = torch.full((3 * len(tensor), *tensor.shape[1:]), float("nan")).to(tensor)
    storage[len(tensor) : -len(tensor)] = tensor
    return storage[len(tensor) : -len(tensor)]


@pytest.mark.parametrize("tasks", [2, 6], ids=["rows chosen from", "rows gathered"])
@pytest.mark.parametrize("operator", ["mixture_of_adapters", "mixture_of_lora_linear"])
def test_a_task(operator: str, tasks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    gate = torch.randn(tasks, EXPERTS, CHANNELS, generator=generator, dtype=torch.float64).requires_grad_()
    task_ids = torch.randint(0, tasks, (ROWS,), generator=generator)
    task_ids[[1, 4, 5, 11]] = torch.tensor([-1, tasks, -tasks, 2 * tasks - 1])
    inputs = make_inputs(operator, gate, {"task_ids": task_ids})
    known = (task_ids >= 0) & (task_ids < tasks)

    def with_a_task_of_no_weight(gate: Tensor, **rest: Tensor) -> Tensor:
        rest["task_ids"] = torch.where(known, task_ids, tasks)
        return getattr(lion_reference, operator)(gate=torch.cat([gate, torch.zeros_like(gate[:1])]), **rest)

    expected = outputs_and_gradients(with_a_task_of_no_weight, inputs)
    check(operator, inputs, expected, device, monkeypatch)


@pytest.mark.parametrize("operator", ["mixture_of_adapters", "mixture_of_lora_linear"])
def test_an_expert(operator: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    gate = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64).requires_grad_()
    expert_ids = torch.randint(-1, EXPERTS, (ROWS, 2), generator=generator)
    expert_ids[[1, 4, 5], 1] = torch.tensor([-7, EXPERTS, 2**31])
    inputs = make_inputs(operator, gate, {"expert_ids": expert_ids})
    none = {**inputs, "expert_ids": torch.where(expert_ids < EXPERTS, expert_ids.clamp(min=-1), -1)}
    expected = outputs_and_gradients(getattr(lion_reference, operator), none)
    check(operator, inputs, expected, device, monkeypatch)


def check(
    operator: str,
    inputs: Inputs,
    expected: dict[str, Tensor],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = getattr(lion_kernels, operator)
    with pytest.raises(ValueError, match=r"(task|expert)_ids: expected values from (0|-1) to"):
        function(**cast(inputs, torch.float32, "cpu"), backend="triton")
    monkeypatch.setattr(importlib.import_module("lion_kernels.low_rank.gates"), "values_on_host", lambda ids: False)
    if operator == "mixture_of_lora_linear":
        monkeypatch.setattr(importlib.import_module(f"lion_kernels.{operator}"), "fuses", lambda *_: True)
    given = cast(inputs, torch.float32, device)
    given["gate"] = amid_nans(given["gate"].detach()).requires_grad_()
    for name, value in outputs_and_gradients(function, given, backend="triton").items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name
    with torch.no_grad():
        assert relative_error(function(**given, backend="triton"), expected["out"]) < OPERATOR_FP32
