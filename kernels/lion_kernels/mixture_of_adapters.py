"""Mixture of low-rank adapters, weighed by a gate (LION, arXiv 2311.11860, section 3.3; soft and top-k mixtures).

    out = residual + sum_e g_e * (W_up_e act(W_down_e x + b_down_e) + b_up_e)

The gate g_e is one of
    channel   gate [R, E, D], a row per task: a sequence takes the row of its task id (LION)
    dense     gate [..., E], a weight per row and expert (soft routing)
    sparse    gate [..., k] with expert_ids [..., k], the weights of the k experts of a row (top-k routing)

In PyTorch, a weight per row and expert commutes with the up-projection, so the dense and sparse forms are one product
over E * r inner channels; a weight per output channel does not, so the channel form adds up the experts one by one.
`lion_kernels.low_rank.launch` has the kernels, and the algebra of backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core.backend import interpreting, needs_dispatch
from lion_kernels.core.cost import Cost
from lion_kernels.core.rowwise import as_rows
from lion_kernels.low_rank import launch as low_rank
from lion_kernels.low_rank.gates import GateForm, KernelGate, align_left, check_gate, dense_from_sparse, flatten_gate
from lion_kernels.low_rank.plain import plain_backward, plain_forward


@torch.library.custom_op("lion_kernels::mixture_of_adapters", mutates_args=(), device_types="cuda")
def _forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate: Tensor,
    ids: Tensor | None,
    residual: Tensor | None,
    form: str,
    rows_per_gate: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """out [T, D] and hidden [T, E*r] from x [T, D] and a gate as `KernelGate` has it."""
    flat = KernelGate(form, gate, ids, rows_per_gate)
    out, hidden = low_rank.forward(x, down_weight, down_bias, up_weight, up_bias, flat, residual, relu, True)
    assert hidden is not None
    return out, hidden


@_forward.register_kernel("cpu")
def _(x, down_weight, down_bias, up_weight, up_bias, gate, ids, residual, form, rows_per_gate, relu):
    flat = KernelGate(form, gate, ids, rows_per_gate)
    run = low_rank.forward if interpreting() else plain_forward
    return run(x, down_weight, down_bias, up_weight, up_bias, flat, residual, relu, True)


@_forward.register_fake
def _(x, down_weight, down_bias, up_weight, up_bias, gate, ids, residual, form, rows_per_gate, relu):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    experts, rank, _ = down_weight.shape
    out = x.new_empty(x.shape[0], up_weight.shape[1], dtype=dtype)
    return out, x.new_empty(x.shape[0], experts * rank)


@torch.library.custom_op("lion_kernels::mixture_of_adapters_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate: Tensor,
    ids: Tensor | None,
    form: str,
    rows_per_gate: int,
    relu: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, down_weight, down_bias, up_weight, up_bias and gate; one that `needs` does not name is empty."""
    flat = KernelGate(form, gate, ids, rows_per_gate)
    return _run_backward(
        low_rank.backward, grad, x, hidden, down_weight, down_bias, up_weight, up_bias, flat, relu, needs
    )


@_backward.register_kernel("cpu")
def _(grad, x, hidden, down_weight, down_bias, up_weight, up_bias, gate, ids, form, rows_per_gate, relu, needs):
    flat = KernelGate(form, gate, ids, rows_per_gate)
    run = low_rank.backward if interpreting() else plain_backward
    return _run_backward(run, grad, x, hidden, down_weight, down_bias, up_weight, up_bias, flat, relu, needs)


def _run_backward(run, grad, x, hidden, down_weight, down_bias, up_weight, up_bias, gate, relu, needs):
    gradients = run(grad, x, hidden, down_weight, down_bias, up_weight, up_bias, gate, relu, needs)
    dx = None if gradients.hidden is None else torch.mm(gradients.hidden, down_weight.flatten(0, 1))
    return [x.new_empty(0) if gradient is None else gradient for gradient in (dx, *gradients[1:])]


@_backward.register_fake
def _(grad, x, hidden, down_weight, down_bias, up_weight, up_bias, gate, ids, form, rows_per_gate, relu, needs):
    inputs = (x, down_weight, down_bias, up_weight, up_bias, gate)
    return [
        value.new_empty(value.shape) if needed else x.new_empty(0) for value, needed in zip(inputs, needs, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    x, down_weight, down_bias, up_weight, up_bias, gate, ids, residual, *ctx.settings = inputs
    _, hidden = output
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, hidden, down_weight, down_bias, up_weight, up_bias, gate, ids)
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    x, hidden, down_weight, down_bias, up_weight, up_bias, gate, ids = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[7] else None
    gradients: list[Tensor] = []
    if any(needs):
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        gradients = _backward(
            grad, x, hidden, down_weight, down_bias, up_weight, up_bias, gate, ids, *ctx.settings, needs
        )  # fmt: skip
    wanted = (gradients[i] if needed else None for i, needed in enumerate(needs))
    return *wanted, None, residual, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


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
            (dense gate). Leading dimensions follow x's from the left; see `lion_kernels.low_rank.gates`.
        task_ids: integers in 0..R-1, one per sequence [B] or one per row.
        expert_ids: integers [..., k] in 0..E-1, -1 for none. Nothing waits for a GPU to look at ids: there, and in a
            compiled graph, one out of range weighs nothing and has no gradient, except that "torch" gathers the gate
            by `task_ids`, where PyTorch counts a negative one from the end and fails on one that is too large.
        residual: [..., D] like x, or None for nothing added.
        activation: "relu" or "identity".
        backend: "auto", "triton" or "torch". "triton" takes fp32, fp16 and bf16; gate and residual may have another
            dtype than x and the weights.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: a shape, a dtype, a device, an activation or a backend that does not fit; the message names the
            argument.
    """
    _check(x, down_weight, down_bias, up_weight, up_bias, residual, activation)
    experts, _, channels = down_weight.shape
    form = check_gate(gate, x, experts, channels, task_ids, expert_ids)
    weights = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    others = {"gate": gate, "residual": residual, "task_ids": task_ids, "expert_ids": expert_ids}
    low_rank.check_placement(x, weights, others)
    relu = activation == "relu"
    if low_rank.is_supported(x, backend, "mixture_of_adapters"):
        return run_kernels(x, weights, gate, task_ids, expert_ids, residual, form, relu)
    return compose(x, weights, gate, task_ids, expert_ids, residual, form, relu)


def cost(
    rows: int, channels: int, experts: int, rank: int, dtype: torch.dtype, *, residual: bool = True
) -> tuple[Cost, Cost]:
    """What forward and backward (of every input) cannot avoid, for x [rows, channels].

    Forward moves x, residual and out; backward reads the gradient, x and the hidden channels that forward has written,
    and writes x's gradient: rows of the gradient that are kept on chip give hidden's gradient, and with it x's and the
    weights'. Weights move once, and so do their gradients.
    """
    inner = experts * rank
    weights = 2 * channels * inner
    moved = (3 if residual else 2) * rows * channels + weights
    product = 2 * rows * channels * inner
    return (
        Cost(moved * dtype.itemsize, 2 * product),
        Cost((3 * rows * channels + rows * inner + 2 * weights) * dtype.itemsize, 4 * product),
    )


def run_kernels(
    x: Tensor,
    weights: dict[str, Tensor | None],
    gate: Tensor,
    task_ids: Tensor | None,
    expert_ids: Tensor | None,
    residual: Tensor | None,
    form: GateForm,
    relu: bool,
) -> Tensor:
    """The operator by the kernels; up_weight [E, N, r] and residual [..., N] may have another width than x."""
    rows, weights = low_rank.cast_for_kernels(x, weights)
    down_weight, up_weight = weights["down_weight"], weights["up_weight"]
    assert down_weight is not None
    assert up_weight is not None
    flat = flatten_gate(form, gate, x.shape[:-1], down_weight.shape[0], task_ids, expert_ids)
    if residual is not None:
        residual = as_rows(residual)
    arguments = (rows, down_weight, weights["down_bias"], up_weight, weights["up_bias"])
    if needs_dispatch(*arguments, flat.gate, residual):
        out, _ = _forward(*arguments, flat.gate, flat.ids, residual, form, flat.rows_per_gate, relu)
    else:
        out, _ = low_rank.forward(*arguments, flat, residual, relu, False)
    return out.view(*x.shape[:-1], up_weight.shape[1]).to(x.dtype)


def compose(
    x: Tensor,
    weights: dict[str, Tensor | None],
    gate: Tensor,
    task_ids: Tensor | None,
    expert_ids: Tensor | None,
    residual: Tensor | None,
    form: GateForm,
    relu: bool,
) -> Tensor:
    """The operator in PyTorch, differentiable by autograd."""
    down_weight, down_bias, up_weight, up_bias = weights.values()
    assert down_weight is not None
    assert up_weight is not None
    experts, rank, _ = down_weight.shape
    hidden = F.linear(x, down_weight.flatten(0, 1), None if down_bias is None else down_bias.flatten())
    if relu:
        hidden = F.relu(hidden)
    hidden = hidden.unflatten(-1, (experts, rank))
    leading = x.dim() - 1
    if form == "channel":
        assert task_ids is not None
        if x.dim() == 3 and task_ids.shape == x.shape[:1] and x.shape[1] > rank:
            out = _add_by_sequence(hidden, up_weight, up_bias, gate[task_ids.long()], residual)
        else:
            factor = align_left(gate[task_ids.long()], leading, trailing=2)  # [..., E, D]
            out = _add_by_channel(hidden, up_weight, up_bias, factor, residual)
    else:
        if form == "sparse":
            assert expert_ids is not None
            gate = dense_from_sparse(gate, expert_ids, experts)
        out = _add_by_row(hidden, up_weight, up_bias, align_left(gate, leading, trailing=1), residual)
    return out.to(x.dtype)


def _add_by_sequence(
    hidden: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    factor: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """One product a sequence over E * r inner channels, its gate, factor [B, E, D], folded into the up-projection.

    The gradient is then the one by which `low_rank` computes the weights' and the gate's: nothing of the size of x is
    kept or gone over for them. With no more rows than the rank folding costs more than it saves.
    """
    weight = (factor.unsqueeze(-1) * up_weight).transpose(1, 2).flatten(2).mT  # [B, E * r, D]
    bias = None if up_bias is None else (factor * up_bias).sum(1, keepdim=True)  # [B, 1, D]
    inner = hidden.flatten(-2)
    autocast = torch.is_autocast_enabled(inner.device.type)
    if residual is None or autocast or not residual.dtype == weight.dtype == inner.dtype:
        out = torch.bmm(inner, weight.to(inner.dtype))
        out = out if bias is None else out + bias
        return out if residual is None else residual + out
    if bias is None:
        return torch.baddbmm(residual, inner, weight)
    return (residual + bias).baddbmm_(inner, weight)


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
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [..., D], got {x.dtype} {list(x.shape)}")
    if residual is not None and not residual.is_floating_point():
        raise ValueError(f"residual: expected a floating dtype, got {residual.dtype}")
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
