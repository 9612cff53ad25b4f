"""Mixture of low-rank adapters, weighted by a gate (LION, arXiv 2311.11860, section 3.3; soft and top-k mixtures).

    out = residual + sum_e g_e * (W_up_e act(W_down_e x + b_down_e) + b_up_e)

The gate g_e has one of three forms:
    channel   gate [R, E, D], one row per task; a sequence uses the row of its task id (LION)
    dense     gate [..., E], one weight per row and expert (soft routing)
    sparse    gate [..., k] with expert_ids [..., k], the weights of a row's k experts (top-k routing)

`lion_kernels.low_rank.launch` has the algebra of backward and launches the kernels of `lion_kernels.low_rank.kernels`;
`lion_kernels.low_rank.plain` has the mixture in PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from lion_kernels.core import operator
from lion_kernels.core.arguments import FLOATING, check_choice, check_floating, check_tensors
from lion_kernels.core.backend import choose_backend, needs_dispatch
from lion_kernels.core.cost import Cost
from lion_kernels.core.rowwise import as_rows, last_contiguous
from lion_kernels.low_rank import launch as low_rank
from lion_kernels.low_rank import plain
from lion_kernels.low_rank.adapters import Adapters
from lion_kernels.low_rank.gates import Gate, KernelGate, check_gate, flatten_gate
from lion_kernels.low_rank.launch import Gradients
from lion_kernels.low_rank.specs import kernel_specs


def launch_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, adapters: Adapters, gate: KernelGate, relu: bool, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of x, down_weight, down_bias, up_weight, up_bias and gate; empty if `needs` excludes one."""
    return _with_input(x, adapters, low_rank.launch_backward(grad, x, hidden, adapters, gate, relu, needs))


def plain_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, adapters: Adapters, gate: KernelGate, relu: bool, needs: list[bool]
) -> list[Tensor]:
    return _with_input(x, adapters, plain.plain_backward(grad, x, hidden, adapters, gate, relu, needs))


def _with_input(x: Tensor, adapters: Adapters, gradients: Gradients) -> list[Tensor]:
    """Replace hidden's gradient by x's, and None by an empty tensor."""
    dx = None if gradients.hidden is None else torch.mm(gradients.hidden, adapters.down_weight.flatten(0, 1))
    return [x.new_empty(0) if gradient is None else gradient for gradient in (dx, *gradients[1:])]


def fake_forward(x: Tensor, adapters: Adapters, gate: KernelGate, residual: Tensor | None, relu: bool) -> Any:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    experts, rank, _ = adapters.down_weight.shape
    out = x.new_empty(x.shape[0], adapters.up_weight.shape[1], dtype=dtype)
    return out, x.new_empty(x.shape[0], experts * rank)


def fake_backward(grad, x, hidden, adapters, gate, relu, needs) -> list[Tensor]:
    inputs = (x, *adapters, gate.gate)
    return [value.new_empty(value.shape) if need else x.new_empty(0) for value, need in zip(inputs, needs, strict=True)]


def _bundle(
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
) -> tuple[Any, ...]:
    """Bundle the op's arguments, x [T, D] and a gate laid out as in `KernelGate`, for the functions above."""
    adapters = Adapters(down_weight, down_bias, up_weight, up_bias)
    return x, adapters, KernelGate(form, gate, ids, rows_per_gate), residual, relu


def _bundle_backward(
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
) -> tuple[Any, ...]:
    adapters = Adapters(down_weight, down_bias, up_weight, up_bias)
    return grad, x, hidden, adapters, KernelGate(form, gate, ids, rows_per_gate), relu, needs


def _setup_context(ctx, inputs, output) -> None:
    *differentiable, ids, residual, form, rows_per_gate, relu = inputs
    x, *others = differentiable
    _, hidden = output
    ctx.settings = form, rows_per_gate, relu
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, hidden, *others, ids)
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    needs = list(ctx.needs_input_grad[:6])
    residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[7] else None
    wanted: tuple[Tensor | None, ...] = (None,) * 6
    if any(needs):
        gradients = backward_op(last_contiguous(grad), *ctx.saved_tensors, *ctx.settings, needs)
        wanted = operator.needed_gradients(gradients, needs)
    return *wanted, None, residual, None, None, None


def cost(
    rows: int, channels: int, experts: int, rank: int, dtype: torch.dtype, *, residual: bool = True
) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward (for every input) for x [rows, channels].

    Forward moves x, residual and out. Backward reads the gradient, x and the hidden channels that forward wrote, and
    writes x's gradient: rows of the gradient kept on chip give hidden's gradient, and with it those of x and the
    weights. Weights and their gradients move once.
    """
    inner = experts * rank
    weights = 2 * channels * inner
    moved = (3 if residual else 2) * rows * channels + weights
    product = 2 * rows * channels * inner
    return (
        Cost(moved * dtype.itemsize, 2 * product),
        Cost((3 * rows * channels + rows * inner + 2 * weights) * dtype.itemsize, 4 * product),
    )


backward_op = operator.define(
    "mixture_of_adapters_backward",
    launch=launch_backward,
    plain=plain_backward,
    fake=fake_backward,
    bundle=_bundle_backward,
)
forward_op = operator.define(
    "mixture_of_adapters",
    launch=low_rank.launch_forward,
    plain=plain.plain_forward,
    fake=fake_forward,
    bundle=_bundle,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


def run_kernels(x: Tensor, adapters: Adapters, given: Gate, residual: Tensor | None, relu: bool) -> Tensor:
    """Run the operator on the kernels; the width N of up_weight [E, N, r] and residual [..., N] may differ from x's."""
    rows, weights = low_rank.cast_for_kernels(x, adapters)
    adapters = Adapters(*weights)
    gate = flatten_gate(given, x.shape[:-1], adapters.down_weight.shape[0])
    if residual is not None:
        residual = as_rows(residual)
    if needs_dispatch(rows, *adapters, gate.gate, residual):
        settings = gate.form, gate.rows_per_gate, relu
        out, _ = forward_op(rows, *adapters, gate.gate, gate.ids, residual, *settings)
    else:
        out, _ = low_rank.launch_forward(rows, adapters, gate, residual, relu, save=False)
    return out.view(*x.shape[:-1], adapters.up_weight.shape[1]).to(x.dtype)


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
    """Compute `residual + sum_e g_e * (up_e act(down_e x))`, differentiable in every floating-point argument.

    Args:
        x: [..., D], any leading dimensions; any of them may be 0.
        down_weight: [E, r, D], E and r at least 1. All weights and biases have x's dtype, but under autocast.
        down_bias: [E, r] or None.
        up_weight: [E, D, r].
        up_bias: [E, D] or None.
        gate: [R, E, D] with `task_ids` (channel gate), [..., k] with `expert_ids` (sparse gate), else [..., E]
            (dense gate). Its leading dimensions match x's from the left; see `lion_kernels.low_rank.gates`.
        task_ids: integers in 0..R-1, one per sequence [B] or one per row.
        expert_ids: integers [..., k] in 0..E-1, -1 for none. Ids on a GPU are not checked, which would synchronise:
            there, and in a compiled graph, an id out of range has zero weight and no gradient. The exception is
            "torch", which gathers the gate by `task_ids`: PyTorch counts negative ids from the end and fails on ids
            that are too large.
        residual: [..., D] like x, or None to add nothing.
        activation: "relu" or "identity".
        backend: "auto", "triton" or "torch". "triton" supports fp32, fp16 and bf16; the dtype of gate and residual may
            differ from that of x and the weights.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
    """
    adapters = Adapters(down_weight, down_bias, up_weight, up_bias)
    others = {"residual": residual, "task_ids": task_ids, "expert_ids": expert_ids}
    required = {"x": x, "down_weight": down_weight, "up_weight": up_weight, "gate": gate}
    check_tensors(required, {"down_bias": down_bias, "up_bias": up_bias, **others})
    check_choice("activation", activation, ("relu", "identity"), "'relu' or 'identity'")
    _check(x, adapters, residual)
    experts, _, channels = down_weight.shape
    given = check_gate(gate, x, experts, channels, task_ids, expert_ids)
    low_rank.check_placement(x, adapters._asdict(), {"gate": gate, **others})
    chosen = choose_backend(backend, "mixture_of_adapters", x.device, low_rank.why_unsupported(x))
    run = run_kernels if chosen == "triton" and x.numel() and gate.numel() else plain.compose
    return run(x, adapters, given, residual, relu=activation == "relu")


def _check(x: Tensor, adapters: Adapters, residual: Tensor | None) -> None:
    down_weight, down_bias, up_weight, up_bias = adapters
    if x.dim() == 0 or x.dtype not in FLOATING:
        raise ValueError(f"x: expected floating [..., D], got {x.dtype} {list(x.shape)}")
    if residual is not None:
        check_floating("residual", residual)
    channels = x.shape[-1]
    if down_weight.dim() != 3 or down_weight.shape[-1] != channels:
        raise ValueError(f"down_weight: expected [E, r, D] with D={channels} (from x), got {list(down_weight.shape)}")
    experts, rank, _ = down_weight.shape
    low_rank.check_experts("down_weight", down_weight)
    expected = {
        "up_weight": (up_weight, (experts, channels, rank)),
        "down_bias": (down_bias, (experts, rank)),
        "up_bias": (up_bias, (experts, channels)),
        "residual": (residual, tuple(x.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
