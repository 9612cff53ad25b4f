"""Task and expert ids out of range: they have no weight if checking them would mean waiting for the GPU.

The gate lies between NaNs in memory, so that an out-of-bounds read shows.
"""

import pytest
import torch
from torch import Tensor

from lion_fast.check import cases
from lion_fast.check.cases import Case, Tensors
from lion_fast.check.compare import leaves
from tests.kernels.contract import CPU, computing, expect_close, make, reference, run

pytestmark = pytest.mark.usefixtures("poison")
ROWS, EXPERTS, CHANNELS, RANK = (12,), 3, 32, 8
operators = pytest.mark.parametrize("operator", ["mixture_of_adapters", "mixture_of_lora_linear"])


def make_case(operator: str, form: str, **options: int) -> Case:
    if operator == "mixture_of_adapters":
        return cases.adapters(form, ROWS, CHANNELS, EXPERTS, RANK, **options)
    return cases.lora(form, ROWS, CHANNELS, CHANNELS, EXPERTS, RANK, **options)


def amid_nans(tensor: Tensor) -> Tensor:
    """Return the same values, with as many NaNs before and after them in memory."""
    storage = torch.full((3 * len(tensor), *tensor.shape[1:]), float("nan")).to(tensor)
    storage[len(tensor) : -len(tensor)] = tensor
    return storage[len(tensor) : -len(tensor)]


def expect_no_weight(case: Case, tensors: Tensors, expected: Tensors, device: torch.device) -> None:
    """Check that unknown ids on the host are refused, and that others give the expected results."""
    with pytest.raises(ValueError, match=r"(task|expert)_ids: expected values from (0|-1) to"):
        run(case, leaves(tensors, torch.float32, CPU), "triton")
    given = leaves(tensors, torch.float32, device)
    given["gate"] = amid_nans(given["gate"].detach()).requires_grad_()
    way = "fused" if case.operator == "mixture_of_lora_linear" else "triton"
    with pytest.MonkeyPatch.context() as patch, computing(way) as backend:
        patch.setattr("lion_kernels.low_rank.gates.values_on_host", lambda ids: False)
        expect_close(run(case, given, backend), expected)
        with torch.no_grad():
            expect_close(run(case, given, backend), expected)


@pytest.mark.parametrize("tasks", [2, 6], ids=["rows chosen from", "rows gathered"])
@operators
def test_a_task(operator: str, tasks: int, device: torch.device) -> None:
    case = make_case(operator, "channel by row", tasks=tasks)
    tensors = make(case, torch.float64)
    ids, gate = tensors["task_ids"], tensors["gate"].detach()
    ids[[1, 4, 5, 11]] = torch.tensor([-1, tasks, -tasks, 2 * tasks - 1])
    known = (ids >= 0) & (ids < tasks)
    no_weight = {"task_ids": ids.where(known, tasks), "gate": torch.cat([gate, torch.zeros_like(gate[:1])])}
    expected = reference(case, tensors | no_weight)
    expect_no_weight(case, tensors, expected | {"gate": expected["gate"][:tasks]}, device)


@operators
def test_an_expert(operator: str, device: torch.device) -> None:
    case = make_case(operator, "sparse")
    tensors = make(case, torch.float64)
    ids = tensors["expert_ids"]
    ids[[1, 4, 5], 1] = torch.tensor([-7, EXPERTS, 2**31])
    no_weight = {"expert_ids": torch.where(ids < EXPERTS, ids.clamp(min=-1), -1)}
    expect_no_weight(case, tensors, reference(case, tensors | no_weight), device)
