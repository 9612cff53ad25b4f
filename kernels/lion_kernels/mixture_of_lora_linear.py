"""A linear layer with a gated mixture of low-rank updates (LoRA, arXiv 2106.09685; top-k: LLaVA-MoLE, 2401.16160).

    y = x W^T + b + scaling * sum_e g_e * (x A_e^T) B_e^T

The gate's forms and the gradients of the update are `mixture_of_adapters`', with A down, B up and no activation;
`lion_kernels.low_rank.launch` has the algebra. On top of them, with g = dy,

    dx = g W + sum_e d hidden_e A_e        dW = g^T x        db = sum_t g_t

Two ways to y, chosen by shape: the low-rank part in the tile loop of the product with W, or W by the library's product
and the update added to it, which moves y twice more. The second is the one where the update reads another input than W,
as with LoRA's dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core.backend import interpreting, needs_dispatch
from lion_kernels.core.cost import H200, Cost, floor_seconds
from lion_kernels.core.tuned_sizes import lookup
from lion_kernels.low_rank import launch as low_rank
from lion_kernels.low_rank.gates import KernelGate, check_gate, flatten_gate
from lion_kernels.low_rank.plain import plain_backward, plain_forward
from lion_kernels.mixture_of_adapters import compose, run_kernels

# The rate of our product beside the library's, until a table says better for a GPU: an assumption, not a measurement.
_ASSUMED_EFFICIENCY = 0.75


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: KernelGate,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    if fuses(x.shape[0], weight.shape[1], weight.shape[0], x.dtype):
        return low_rank.launch_linear(x, weight, bias, lora_a, lora_b, gate, keep_hidden)
    base = F.linear(x, weight, bias)
    return low_rank.forward(x, lora_a, None, lora_b, None, gate, base, False, keep_hidden)


def _run_plain_forward(x, weight, bias, lora_a, lora_b, gate, keep_hidden):
    return plain_forward(x, lora_a, None, lora_b, None, gate, F.linear(x, weight, bias), False, keep_hidden)


def fuses(rows: int, channels_in: int, channels_out: int, dtype: torch.dtype) -> bool:
    """Whether the update rides in the tile loop of x W^T: the GPU's table says, else the cost of both ways."""
    by_cost = False
    if dtype.itemsize == 2:
        product = Cost(
            (rows * (channels_in + channels_out) + channels_in * channels_out) * dtype.itemsize,
            2 * rows * channels_in * channels_out,
        )
        ours = Cost(product.bytes, int(product.flops / _ASSUMED_EFFICIENCY))
        added = Cost(2 * rows * channels_out * dtype.itemsize, 0)
        library = floor_seconds(product, H200, dtype) + floor_seconds(added, H200, dtype)
        by_cost = floor_seconds(ours, H200, dtype) < library
    width = "narrow" if channels_in <= 1024 else "wide"
    rows_class = "decode" if rows <= 16 else "few" if rows <= 1024 else "many"
    return lookup("mixture_of_lora_linear", f"{rows_class}-{width}", {"fused": by_cost})["fused"]


@torch.library.custom_op("lion_kernels::mixture_of_lora_linear", mutates_args=(), device_types="cuda")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    ids: Tensor | None,
    form: str,
    rows_per_gate: int,
) -> tuple[Tensor, Tensor]:
    """y [T, Dout] and hidden [T, E*r] from x [T, Din] and a gate as `KernelGate` has it."""
    out, hidden = _run_forward(x, weight, bias, lora_a, lora_b, KernelGate(form, gate, ids, rows_per_gate), True)
    assert hidden is not None
    return out, hidden


@_forward.register_kernel("cpu")
def _(x, weight, bias, lora_a, lora_b, gate, ids, form, rows_per_gate):
    run = _run_forward if interpreting() else _run_plain_forward
    return run(x, weight, bias, lora_a, lora_b, KernelGate(form, gate, ids, rows_per_gate), True)


@_forward.register_fake
def _(x, weight, bias, lora_a, lora_b, gate, ids, form, rows_per_gate):
    experts, rank, _ = lora_a.shape
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], experts * rank)


@torch.library.custom_op("lion_kernels::mixture_of_lora_linear_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    ids: Tensor | None,
    form: str,
    rows_per_gate: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias, lora_a, lora_b and gate; one that `needs` does not name is empty."""
    flat = KernelGate(form, gate, ids, rows_per_gate)
    return _run_backward(low_rank.backward, grad, x, hidden, weight, lora_a, lora_b, flat, needs)


@_backward.register_kernel("cpu")
def _(grad, x, hidden, weight, lora_a, lora_b, gate, ids, form, rows_per_gate, needs):
    run = low_rank.backward if interpreting() else plain_backward
    flat = KernelGate(form, gate, ids, rows_per_gate)
    return _run_backward(run, grad, x, hidden, weight, lora_a, lora_b, flat, needs)


def _run_backward(run, grad, x, hidden, weight, lora_a, lora_b, gate, needs):
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gate = needs
    gradients = run(
        grad, x, hidden, lora_a, None, lora_b, None, gate, False, (needs_x, needs_a, False, needs_b, False, needs_gate)
    )
    dx = torch.mm(grad, weight).addmm_(gradients.hidden, lora_a.flatten(0, 1)) if needs_x else None
    dweight = torch.mm(grad.t(), x) if needs_weight else None
    dbias = grad.sum(0) if needs_bias else None
    found = (dx, dweight, dbias, gradients.down_weight, gradients.up_weight, gradients.gate)
    return [x.new_empty(0) if gradient is None else gradient for gradient in found]


@_backward.register_fake
def _(grad, x, hidden, weight, lora_a, lora_b, gate, ids, form, rows_per_gate, needs):
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_a.shape, lora_b.shape)
    found = [x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs[:5], strict=True)]
    return [*found, gate.new_empty(gate.shape) if needs[5] else x.new_empty(0)]


def _setup_context(ctx, inputs, output):
    x, weight, _bias, lora_a, lora_b, gate, ids, *ctx.settings = inputs
    _, hidden = output
    ctx.save_for_backward(x, hidden, weight, lora_a, lora_b, gate, ids)
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    x, hidden, weight, lora_a, lora_b, gate, ids = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    gradients = _backward(grad, x, hidden, weight, lora_a, lora_b, gate, ids, *ctx.settings, needs)
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *wanted, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def mixture_of_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    *,
    scaling: float = 1.0,
    task_ids: Tensor | None = None,
    expert_ids: Tensor | None = None,
    update_input: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x W^T + b + scaling * sum_e g_e * (x A_e^T) B_e^T`, differentiable in every floating-point argument.

    Args:
        x: [..., Din], any leading dimensions.
        weight: [Dout, Din], frozen or not.
        bias: [Dout] or None.
        lora_a: [E, r, Din].
        lora_b: [E, Dout, r].
        gate: [R, E, Dout] with `task_ids` (channel gate), [..., k] with `expert_ids` (sparse gate), else [..., E]
            (dense gate). Leading dimensions follow x's from the left; see `lion_kernels.low_rank.gates`.
        scaling: of the update: alpha / r in LoRA's words.
        task_ids: integers in 0..R-1, one per sequence [B] or one per row.
        expert_ids: integers [..., k] in 0..E-1, -1 for none. Nothing waits for a GPU to look at ids: there, and in a
            compiled graph, one out of range weighs nothing and has no gradient, except that "torch" gathers the gate
            by `task_ids`, where PyTorch counts a negative one from the end and fails on one that is too large.
        update_input: [..., Din] in x's dtype, what the A_e read instead of x, such as `dropout(x)`.
        backend: "auto", "triton" or "torch". "triton" takes fp32, fp16 and bf16; the gate may have another dtype than
            x and the weights.

    Returns:
        [..., Dout] in x's dtype.

    Raises:
        ValueError: a shape, a dtype, a device or a backend that does not fit; the message names the argument.
    """
    _check(x, weight, bias, lora_a, lora_b, update_input)
    experts, _, _ = lora_a.shape
    channels = weight.shape[0]
    form = check_gate(gate, x, experts, channels, task_ids, expert_ids)
    weights = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    others = {"gate": gate, "task_ids": task_ids, "expert_ids": expert_ids, "update_input": update_input}
    low_rank.check_placement(x, weights, others)
    if scaling != 1.0:
        gate = gate * scaling
    on_kernels = low_rank.is_supported(x, backend, "mixture_of_lora_linear")
    if update_input is not None or not on_kernels:
        base = F.linear(x, weight, bias)
        pair = {"down_weight": lora_a, "down_bias": None, "up_weight": lora_b, "up_bias": None}
        read = x if update_input is None else update_input
        run = run_kernels if on_kernels else compose
        return run(read, pair, gate, task_ids, expert_ids, base, form, relu=False)
    rows, cast = low_rank.cast_for_kernels(x, weights)
    arguments = (rows, cast["weight"], cast["bias"], cast["lora_a"], cast["lora_b"])
    flat = flatten_gate(form, gate, x.shape[:-1], experts, task_ids, expert_ids)
    if needs_dispatch(*arguments, flat.gate):
        out, _ = _forward(*arguments, flat.gate, flat.ids, form, flat.rows_per_gate)
    else:
        out, _ = _run_forward(*arguments, flat, False)  # type: ignore[arg-type]
    return out.view(*x.shape[:-1], channels).to(x.dtype)


def cost(
    rows: int, channels_in: int, channels_out: int, experts: int, rank: int, dtype: torch.dtype, *, frozen: bool = True
) -> tuple[Cost, Cost]:
    """What forward and backward cannot avoid, for x [rows, channels_in]; `frozen`: without W's gradient."""
    inner, base = experts * rank, channels_in * channels_out
    updates = (channels_in + channels_out) * inner
    ends = rows * (channels_in + channels_out)
    low_rank_product = 2 * rows * (channels_in + channels_out) * inner
    dense_product = 2 * rows * base
    return (
        Cost((ends + base + updates) * dtype.itemsize, dense_product + low_rank_product),
        Cost(
            # x, the gradients of y and of x, and hidden once each; every weight and its gradient.
            (ends + rows * (channels_in + inner) + base * (1 if frozen else 2) + 2 * updates) * dtype.itemsize,
            dense_product * (1 if frozen else 2) + 2 * low_rank_product,
        ),
    )


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, update_input: Tensor | None
) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [..., Din], got {x.dtype} {list(x.shape)}")
    width = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight: expected [Dout, {width}] (Din from x), got {list(weight.shape)}")
    if lora_a.dim() != 3 or lora_a.shape[2] != width:
        raise ValueError(f"lora_a: expected [E, r, {width}] (Din from x), got {list(lora_a.shape)}")
    experts, rank, _ = lora_a.shape
    expected = {"lora_b": (lora_b, (experts, weight.shape[0], rank)), "bias": (bias, (weight.shape[0],))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if update_input is not None and (update_input.shape != x.shape or update_input.dtype != x.dtype):
        raise ValueError(
            f"update_input: expected {list(x.shape)} in {x.dtype} like x, "
            f"got {list(update_input.shape)} in {update_input.dtype}"
        )
