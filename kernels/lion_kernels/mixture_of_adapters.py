"""Mixture of low-rank adapters, weighed by a gate (LION, section 3.3; soft and top-k mixtures of LoRA).

    out = residual + sum_e g_e * (W_up_e act(W_down_e x + b_down_e) + b_up_e)

The gate g_e is one of
    channel   gate [R, E, D], a row per task: a sequence takes the row of its task id (LION)
    dense     gate [..., E], a weight per row and expert (soft routing)
    sparse    gate [..., k] with expert_ids [..., k], the weights of the k experts of a row (top-k routing)

A weight per row and expert commutes with the up-projection, so the dense and sparse forms are one product over
E * r inner channels. A weight per output channel does not, so the channel form adds up the experts one by one.
"""

import torch.nn.functional as F
from torch import Tensor

from lion_kernels.backend import resolve_backend
from lion_kernels.gates import align_left, check_gate, dense_from_sparse


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
    backend: str = "auto",
) -> Tensor:
    """`residual + sum_e g_e * (up_e act(down_e x))`, differentiable in every floating-point argument.

    Args:
        x: [..., D], any leading dimensions.
        down_weight: [E, r, D].
        down_bias: [E, r] or None.
        up_weight: [E, D, r].
        up_bias: [E, D] or None.
        gate: [R, E, D] with `task_ids` (channel gate), [..., k] with `expert_ids` (sparse gate), else [..., E]
            (dense gate). Leading dimensions follow x's from the left; see `lion_kernels.gates`.
        task_ids: integers in 0..R-1, one per sequence [B] or one per row.
        expert_ids: integers [..., k] in 0..E-1, -1 for none.
        residual: [..., D] like x, or None for nothing added.
        activation: "relu" or "identity".
        backend: "auto", "triton" or "torch".

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: a shape, an activation or a backend that does not fit; the message names the argument.
    """
    _check(x, down_weight, down_bias, up_weight, up_bias, residual, activation)
    experts, rank, channels = down_weight.shape
    form = check_gate(gate, x, experts, channels, task_ids, expert_ids)
    resolve_backend(backend, "mixture_of_adapters", x.device)
    hidden = F.linear(x, down_weight.flatten(0, 1), None if down_bias is None else down_bias.flatten())
    if activation == "relu":
        hidden = F.relu(hidden)
    hidden = hidden.unflatten(-1, (experts, rank))
    rows = x.dim() - 1
    if form == "channel":
        assert task_ids is not None
        factor = align_left(gate[task_ids.long()], rows, trailing=2)  # [..., E, D]
        out = _add_by_channel(hidden, up_weight, up_bias, factor, residual)
    else:
        if form == "sparse":
            assert expert_ids is not None
            gate = dense_from_sparse(gate, expert_ids, experts)
        out = _add_by_row(hidden, up_weight, up_bias, align_left(gate, rows, trailing=1), residual)
    return out.to(x.dtype)


def _add_by_channel(
    hidden: Tensor, up_weight: Tensor, up_bias: Tensor | None, factor: Tensor, residual: Tensor | None
) -> Tensor:
    out = residual
    for expert in range(up_weight.shape[0]):
        update = F.linear(hidden[..., expert, :], up_weight[expert], None if up_bias is None else up_bias[expert])
        weighed = update * factor[..., expert, :]
        out = weighed if out is None else out + weighed
    assert out is not None
    return out


def _add_by_row(
    hidden: Tensor, up_weight: Tensor, up_bias: Tensor | None, weights: Tensor, residual: Tensor | None
) -> Tensor:
    inner = (hidden * weights.unsqueeze(-1)).flatten(-2)  # [..., E * r]
    out = F.linear(inner, up_weight.transpose(0, 1).flatten(1))
    if up_bias is not None:
        out = out + weights.to(up_bias.dtype) @ up_bias
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
    if activation not in ("relu", "identity"):
        raise ValueError(f"activation: expected 'relu' or 'identity', got {activation!r}")
    channels = x.shape[-1]
    if down_weight.dim() != 3 or down_weight.shape[-1] != channels:
        raise ValueError(f"down_weight: expected [E, r, D] with D={channels} (from x), got {list(down_weight.shape)}")
    experts, rank, _ = down_weight.shape
    expected = {
        "up_weight": (up_weight, (experts, channels, rank)),
        "down_bias": (down_bias, (experts, rank)),
        "up_bias": (up_bias, (experts, channels)),
        "residual": (residual, tuple(x.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
