"""The forms of a mixture's gate, and its layout along the rows of x.

Leading dimensions are aligned on the left: [B, ...] gives x [B, L, D] one value per sequence, [B, L, ...] one per row.
A dimension of 1 broadcasts.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lion_kernels.core.arguments import INTEGERS, check_floating, shown_ids
from lion_kernels.core.backend import values_on_host

GateForm = Literal["channel", "dense", "sparse"]


class Gate(NamedTuple):
    """A gate as passed to the operators.

    Attributes:
        form: "channel", "sparse" or "dense", see `check_gate`.
        weights: [R, E, N] (channel), [..., k] (sparse) or [..., E] (dense).
        task_ids: for a channel gate.
        expert_ids: for a sparse gate.
    """

    form: GateForm
    weights: Tensor
    task_ids: Tensor | None
    expert_ids: Tensor | None


class KernelGate(NamedTuple):
    """A gate as passed to the kernels: contiguous, with row `t // rows_per_gate` for row t of x [T, D].

    Attributes:
        form: "channel", "dense" or "sparse".
        gate: [R, E, N] (channel), else the weights of all experts [T / rows_per_gate, E].
        ids: task ids [T / rows_per_gate] (channel), expert ids [T / rows_per_gate, k] (sparse) or None (dense).
    """

    form: str
    gate: Tensor
    ids: Tensor | None
    rows_per_gate: int


def flatten_gate(given: Gate, leading: torch.Size, experts: int) -> KernelGate:
    """Return the gate of x [*leading, D], differentiable in its weights.

    It is copied only if it broadcasts over a first dimension.
    """
    form, gate, task_ids, expert_ids = given
    if form == "channel":
        assert task_ids is not None
        ids, rows_per_gate = _flatten(task_ids, leading, trailing=0)
        return KernelGate(form, gate.contiguous(), ids, rows_per_gate)
    if form == "dense":
        flat, rows_per_gate = _flatten(gate, leading, trailing=1)
        return KernelGate(form, flat, None, rows_per_gate)
    assert expert_ids is not None
    flat, rows_per_gate = _flatten(dense_from_sparse(gate, expert_ids, experts), leading, trailing=1)
    ids, _ = _flatten(expert_ids, leading, trailing=1)
    return KernelGate(form, flat, ids, rows_per_gate)


def _flatten(tensor: Tensor, leading: torch.Size, trailing: int) -> tuple[Tensor, int]:
    """Return `tensor` as [n, *trailing dimensions], and how many consecutive rows of x share each of the n."""
    given = tensor.dim() - trailing
    rest = tensor.shape[given:]
    while given and tensor.shape[given - 1] == 1:
        given -= 1
    tensor = tensor.reshape(tensor.shape[:given] + rest)
    if tensor.shape[:given] != leading[:given]:
        tensor = tensor.expand(leading[:given] + rest)
    return tensor.reshape(math.prod(leading[:given]), *rest).contiguous(), math.prod(leading[given:])


def check_gate(
    gate: Tensor, x: Tensor, experts: int, channels: int, task_ids: Tensor | None, expert_ids: Tensor | None
) -> Gate:
    """Check a gate and return it: "channel" with `task_ids`, "sparse" with `expert_ids`, else "dense".

    Args:
        gate: [R, experts, channels], [..., k] or [..., experts].
        x: [..., D]; its leading dimensions are those of the gate or the ids.
        task_ids: integers in 0..R-1.
        expert_ids: integers in -1..experts-1, shaped like the gate.

    Raises:
        ValueError: invalid shape, dtype or, if its values can be read without synchronising, id.
    """
    check_floating("gate", gate)
    if task_ids is not None and expert_ids is not None:
        raise ValueError("task_ids, expert_ids: expected at most one of them, got both")
    if task_ids is not None:
        if gate.dim() != 3 or tuple(gate.shape[1:]) != (experts, channels):
            raise ValueError(f"gate: expected [R, {experts}, {channels}] with task_ids, got {list(gate.shape)}")
        if not gate.shape[0]:
            raise ValueError(f"gate: expected [R, E, N] with R at least 1, got {list(gate.shape)}")
        _check_leading("task_ids", task_ids.shape, x)
        _check_ids("task_ids", task_ids, 0, gate.shape[0])
        return Gate("channel", gate, task_ids, expert_ids)
    if expert_ids is not None:
        if gate.dim() == 0 or gate.shape != expert_ids.shape:
            raise ValueError(f"expert_ids: expected {list(gate.shape)} (from gate), got {list(expert_ids.shape)}")
        _check_leading("gate", gate.shape[:-1], x)
        _check_ids("expert_ids", expert_ids, -1, experts)
        return Gate("sparse", gate, task_ids, expert_ids)
    if gate.dim() == 0 or gate.shape[-1] != experts:
        raise ValueError(f"gate: expected [..., {experts}] (E from down_weight), got {list(gate.shape)}")
    _check_leading("gate", gate.shape[:-1], x)
    return Gate("dense", gate, task_ids, expert_ids)


def align_left(tensor: Tensor, rows: int, trailing: int) -> Tensor:
    """Return `tensor` with x's number of leading dimensions (`rows`), appending ones to its own."""
    given = tensor.dim() - trailing
    return tensor.reshape(*tensor.shape[:given], *[1] * (rows - given), *tensor.shape[given:])


def dense_from_sparse(gate: Tensor, expert_ids: Tensor, experts: int) -> Tensor:
    """Return the weights [..., experts] of a sparse gate; repeated experts add up, and other ids have no weight.

    The implementation compares ids: a scatter would add with atomics, in no fixed order for an expert named more than
    twice.
    """
    named = expert_ids.unsqueeze(-1) == torch.arange(experts, device=expert_ids.device)  # [..., k, E]
    return torch.where(named, gate.unsqueeze(-1), 0).sum(-2)


def _check_leading(name: str, given: torch.Size, x: Tensor) -> None:
    leading = x.shape[:-1]
    if len(given) > len(leading) or any(g not in (1, n) for g, n in zip(given, leading, strict=False)):
        raise ValueError(
            f"{name}: expected leading dimensions {list(leading)} (from x) or the first of them, got {list(given)}"
        )


def _check_ids(name: str, ids: Tensor, low: int, high: int) -> None:
    if ids.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")
    if not values_on_host(ids):
        return
    if not ids.numel():
        return
    least, most = ids.aminmax()
    if least < low or most >= high:
        outside = ids[(ids < low) | (ids >= high)]
        raise ValueError(f"{name}: expected values from {low} to {high - 1}, got {shown_ids(outside)}")
