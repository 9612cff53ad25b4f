"""Expansion of the three forms of a mixture's gate to one: a factor per row, expert and channel.

Leading dimensions are aligned on the left: for x [B, L, D], a gate or id tensor of shape [B] has one value per
sequence, and a tensor of shape [B, L] has one value per row. A dimension of 1 broadcasts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def expand_gate(
    gate: Tensor,
    leading: torch.Size,
    num_experts: int,
    width: int,
    *,
    task_ids: Tensor | None = None,
    expert_ids: Tensor | None = None,
) -> Tensor:
    """Return the factor of every expert's output, [..., E, width] or [..., E, 1].

    The result broadcasts to `leading` + [E, width].

    - Channel gate: `gate` [R, E, width] and `task_ids`, integers in [0, R), shaped like the first dimensions of x.
    - Dense gate: `gate` [..., E].
    - Sparse gate: `gate` [..., k] and `expert_ids` [..., k], integers in [0, E), -1 for none. An expert that occurs
      twice counts twice.

    Raises ValueError if a shape or a value does not match.
    """
    if task_ids is not None and expert_ids is not None:
        raise ValueError("task_ids, expert_ids: expected at most one of them, got both")
    if task_ids is not None:
        if gate.ndim != 3 or gate.shape[1:] != (num_experts, width):
            raise ValueError(f"gate: expected [R, {num_experts}, {width}] with task_ids, got {list(gate.shape)}")
        _check_ids("task_ids", task_ids, 0, gate.shape[0])
        return _align("task_ids", gate[task_ids.long()], leading, trailing=2)
    if expert_ids is not None:
        if gate.shape != expert_ids.shape or gate.ndim == 0:
            raise ValueError(f"expert_ids: expected {list(gate.shape)} (from gate), got {list(expert_ids.shape)}")
        _check_ids("expert_ids", expert_ids, -1, num_experts)
        chosen = F.one_hot(expert_ids.long() + 1, num_experts + 1)[..., 1:]  # [..., k, E], drops -1
        gate = (gate.unsqueeze(-1) * chosen).sum(-2)
    elif gate.ndim == 0 or gate.shape[-1] != num_experts:
        raise ValueError(f"gate: expected [..., {num_experts}] (E from down_weight), got {list(gate.shape)}")
    return _align("gate", gate, leading, trailing=1).unsqueeze(-1)


def _check_ids(name: str, ids: Tensor, low: int, high: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")
    if torch.compiler.is_compiling():
        return  # a graph is traced without values
    outside = ids[(ids < low) | (ids >= high)]
    if outside.numel():
        raise ValueError(f"{name}: expected values from {low} to {high - 1}, got {outside.unique().tolist()}")


def _align(name: str, tensor: Tensor, leading: torch.Size, trailing: int) -> Tensor:
    given = tensor.shape[: tensor.ndim - trailing]
    fits = len(given) <= len(leading) and all(g in (1, n) for g, n in zip(given, leading, strict=False))
    if not fits:
        raise ValueError(
            f"{name}: expected leading dimensions {list(leading)} (from x) or the first of them, got {list(given)}"
        )
    missing = len(leading) - len(given)
    return tensor.reshape(*given, *[1] * missing, *tensor.shape[len(given) :])
