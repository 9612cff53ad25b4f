"""The mixture of adapters: parallel bottleneck adapters weighted by a gate (LION, arXiv 2311.11860).

out = residual + sum_e g_e * (up_weight_e act(down_weight_e x + down_bias_e) + up_bias_e)
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from .gates import expand_gate


def mixture_of_adapters(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate: Tensor,
    *,
    task_ids: Tensor | None = None,
    expert_ids: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Compute the gated sum of E adapters of rank r; all tensors have one floating-point dtype.

    Args:
        x: [..., D].
        down_weight, down_bias: [E, r, D], [E, r] or None.
        up_weight, up_bias: [E, D, r], [E, D] or None.
        gate: [R, E, D] with `task_ids`, [..., k] with `expert_ids`, [..., E] with neither (see `expand_gate`).
        task_ids: integers in [0, R), one per sequence or one per row.
        expert_ids: [..., k] integers in [0, E), -1 for none.
        residual: added to the sum, shaped like x.
        activation: "relu" or "identity".

    Returns: [..., D].
    Raises ValueError if a shape, an id or the activation is invalid.
    """
    _check(x, down_weight, down_bias, up_weight, up_bias, residual, activation)
    num_experts, _, width = down_weight.shape
    hidden = einsum(x, down_weight, "... d, e r d -> ... e r")
    if down_bias is not None:
        hidden = hidden + down_bias
    if activation == "relu":
        hidden = hidden.relu()
    update = einsum(hidden, up_weight, "... e r, e d r -> ... e d")
    if up_bias is not None:
        update = update + up_bias
    factor = expand_gate(gate, x.shape[:-1], num_experts, width, task_ids=task_ids, expert_ids=expert_ids)
    out = (factor * update).sum(-2)
    return out if residual is None else residual + out


def _check(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    width = x.shape[-1]
    if down_weight.ndim != 3 or down_weight.shape[2] != width:
        raise ValueError(f"down_weight: expected [E, r, D] with D={width} (from x), got {list(down_weight.shape)}")
    num_experts, rank, _ = down_weight.shape
    for name, tensor, expected in (
        ("down_bias", down_bias, (num_experts, rank)),
        ("up_weight", up_weight, (num_experts, width, rank)),
        ("up_bias", up_bias, (num_experts, width)),
        ("residual", residual, tuple(x.shape)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name}: expected {list(expected)}, got {list(tensor.shape)}")
    if activation not in ("relu", "identity"):
        raise ValueError(f"activation: expected 'relu' or 'identity', got {activation!r}")


class Adapter(nn.Module):
    """scale * (up_proj relu(down_proj x)), with an inner width of `rank`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.down_proj = nn.Linear(width, rank)
        self.up_proj = nn.Linear(rank, width)
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up_proj(F.relu(self.down_proj(x)))


class MixtureOfAdapters(nn.Module):
    """The mixture of adapters in every feed-forward layer of LION's language model.

    It has two adapters (0 region, 1 image) and a router, a table by task, or one adapter and no router. It computes
    `mixture_of_adapters` with `gate` = ratio * scale, rounded as in the original.
    """

    def __init__(self, width: int, rank: int, num_adapters: int) -> None:
        super().__init__()
        if num_adapters not in (1, 2):
            raise ValueError(f"num_adapters: expected 1 or 2, got {num_adapters}")
        self.adapters = nn.ModuleList(Adapter(width, rank) for _ in range(num_adapters))
        if num_adapters == 2:
            self.router_ratio1 = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, width))  # [task, D]
            self.router_ratio2 = nn.Parameter(torch.tensor([[0.0], [1.0]]).repeat(1, width))

    def forward(self, x: Tensor, task_ids: Tensor | None) -> Tensor:
        """x [B, L, D], task_ids [B] (0 region_level, 1 image_level; unused with one adapter) -> [B, L, D]."""
        updates = torch.stack([adapter(x) for adapter in self.adapters], dim=-2)  # [B, L, E, D]
        if len(self.adapters) == 1:
            return updates.squeeze(-2)
        if task_ids is None:
            raise ValueError("task_ids: expected one id per sequence for a model with two adapters, got None")
        gate = torch.stack([self.router_ratio1, self.router_ratio2], dim=1)  # [task, E, D]
        factor = expand_gate(gate, x.shape[:-1], *gate.shape[1:], task_ids=task_ids)
        return (factor * updates).sum(-2)
