"""A linear layer with a gated mixture of low-rank updates (LoRA, arXiv 2106.09685; top-k: LLaVA-MoLE, 2401.16160).

    y = x W^T + b + scaling * sum_e g_e * (x A_e^T) B_e^T

The gate's forms and the update's gradients are those of `mixture_of_adapters`, with A as the down-projection, B as the
up-projection and no activation; `lion_kernels.low_rank.launch` has the algebra. In addition, with g = dy,

    dx = g W + sum_e d hidden_e A_e        dW = g^T x        db = sum_t g_t

The shape decides between two ways to compute y: the low-rank part in the tile loop of the product with W, or the
library's product with W and a second pass that adds the update, which moves y twice more. An update with an input of
its own, as with LoRA's dropout, always uses the second.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core import operator
from lion_kernels.core.arguments import as_number, check_tensors
from lion_kernels.core.backend import choose_backend, needs_dispatch
from lion_kernels.core.cost import Cost
from lion_kernels.core.rowwise import last_contiguous
from lion_kernels.low_rank import launch as low_rank
from lion_kernels.low_rank import plain
from lion_kernels.low_rank.adapters import Adapters
from lion_kernels.low_rank.arguments import check_lora
from lion_kernels.low_rank.gates import KernelGate, check_gate, flatten_gate
from lion_kernels.low_rank.sizes import fuses
from lion_kernels.low_rank.specs import kernel_specs
from lion_kernels.mixture_of_adapters import run_kernels as add_by_kernels


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, gate: KernelGate, *, save: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return y [T, Dout] and, with `save`, hidden [T, E*r]."""
    if fuses(x.shape[0], weight.shape[1], weight.shape[0], x.dtype):
        return low_rank.launch_linear(x, weight, bias, adapters, gate, save=save)
    return low_rank.launch_forward(x, adapters, gate, F.linear(x, weight, bias), False, save=save)


def plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, gate: KernelGate
) -> tuple[Tensor, Tensor]:
    """Compute `launch_forward` in PyTorch."""
    return plain.plain_forward(x, adapters, gate, F.linear(x, weight, bias), False)


def fake_forward(x, weight, bias, adapters, gate) -> tuple[Tensor, Tensor]:
    experts, rank, _ = adapters.down_weight.shape
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], experts * rank)


def launch_backward(grad, x, hidden, weight, adapters, gate, needs) -> list[Tensor]:
    """Return the gradients of x, weight, bias, lora_a, lora_b and gate; one that `needs` excludes is empty."""
    return _backward(low_rank.launch_backward, grad, x, hidden, weight, adapters, gate, needs)


def plain_backward(grad, x, hidden, weight, adapters, gate, needs) -> list[Tensor]:
    return _backward(plain.plain_backward, grad, x, hidden, weight, adapters, gate, needs)


def _backward(run, grad, x, hidden, weight, adapters, gate, needs) -> list[Tensor]:
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gate = needs
    needs_of_update = (needs_x, needs_a, False, needs_b, False, needs_gate)
    update = run(grad, x, hidden, adapters, gate, False, needs_of_update)
    dx = torch.mm(grad, weight).addmm_(update.hidden, adapters.down_weight.flatten(0, 1)) if needs_x else None
    dweight = torch.mm(grad.t(), x) if needs_weight else None
    dbias = grad.sum(0) if needs_bias else None
    found = (dx, dweight, dbias, update.down_weight, update.up_weight, update.gate)
    return [x.new_empty(0) if gradient is None else gradient for gradient in found]


def fake_backward(grad, x, hidden, weight, adapters, gate, needs) -> list[Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1], adapters.down_weight.shape, adapters.up_weight.shape)
    found = [x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs[:5], strict=True)]
    return [*found, gate.gate.new_empty(gate.gate.shape) if needs[5] else x.new_empty(0)]


def _bundle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    ids: Tensor | None,
    form: str,
    rows_per_gate: int,
) -> tuple:
    """Bundle the op's arguments, x [T, Din] and a gate laid out as in `KernelGate`, for the functions above."""
    return x, weight, bias, Adapters(lora_a, None, lora_b, None), KernelGate(form, gate, ids, rows_per_gate)


def _bundle_backward(
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
) -> tuple:
    adapters = Adapters(lora_a, None, lora_b, None)
    return grad, x, hidden, weight, adapters, KernelGate(form, gate, ids, rows_per_gate), needs


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, lora_a, lora_b, gate, ids, *ctx.settings = inputs
    _, hidden = output
    ctx.save_for_backward(x, hidden, weight, lora_a, lora_b, gate, ids)
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    needs = list(ctx.needs_input_grad[:6])
    gradients = backward_op(last_contiguous(grad), *ctx.saved_tensors, *ctx.settings, needs)
    return *operator.needed_gradients(gradients, needs), None, None, None


def cost(
    rows: int, channels_in: int, channels_out: int, experts: int, rank: int, dtype: torch.dtype, *, frozen: bool = True
) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward for x [rows, channels_in]; `frozen` excludes W's gradient."""
    inner, base = experts * rank, channels_in * channels_out
    updates = (channels_in + channels_out) * inner
    ends = rows * (channels_in + channels_out)
    low_rank_product = 2 * rows * (channels_in + channels_out) * inner
    dense_product = 2 * rows * base
    return (
        Cost((ends + base + updates) * dtype.itemsize, dense_product + low_rank_product),
        Cost(
            # x, hidden and the gradients of y and x move once each, as does every weight and its gradient.
            (ends + rows * (channels_in + inner) + base * (1 if frozen else 2) + 2 * updates) * dtype.itemsize,
            dense_product * (1 if frozen else 2) + 2 * low_rank_product,
        ),
    )


backward_op = operator.define(
    "mixture_of_lora_linear_backward",
    launch=launch_backward,
    plain=plain_backward,
    fake=fake_backward,
    bundle=_bundle_backward,
)
forward_op = operator.define(
    "mixture_of_lora_linear",
    launch=launch_forward,
    plain=plain_forward,
    fake=fake_forward,
    bundle=_bundle,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


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
    """Compute `x W^T + b + scaling * sum_e g_e * (x A_e^T) B_e^T`, differentiable in every floating-point argument.

    Args:
        x: [..., Din], any leading dimensions; any of them, and Dout, may be 0.
        weight: [Dout, Din], frozen or not. It, bias, lora_a and lora_b have x's dtype, but under autocast.
        bias: [Dout] or None.
        lora_a: [E, r, Din], E and r at least 1.
        lora_b: [E, Dout, r].
        gate: [R, E, Dout] with `task_ids` (channel gate), [..., k] with `expert_ids` (sparse gate), else [..., E]
            (dense gate). Its leading dimensions match x's from the left; see `lion_kernels.low_rank.gates`.
        scaling: finite factor of the update, alpha / r in LoRA's terms.
        task_ids: integers in 0..R-1, one per sequence [B] or one per row.
        expert_ids: integers [..., k] in 0..E-1, -1 for none. Ids on a GPU are not checked, which would synchronise:
            there, and in a compiled graph, an id out of range has zero weight and no gradient. The exception is
            "torch", which gathers the gate by `task_ids`: PyTorch counts negative ids from the end and fails on ids
            that are too large.
        update_input: [..., Din] in x's dtype, the update's input if it is not x, such as `dropout(x)`.
        backend: "auto", "triton" or "torch". "triton" supports fp32, fp16 and bf16; the gate's dtype may differ from
            that of x and the weights.

    Returns:
        [..., Dout] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
    """
    others = {"task_ids": task_ids, "expert_ids": expert_ids, "update_input": update_input}
    required = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "gate": gate}
    check_tensors(required, {"bias": bias, **others})
    check_lora(x, weight, bias, lora_a, lora_b, update_input)
    adapters = Adapters(lora_a, None, lora_b, None)
    experts, _, _ = lora_a.shape
    given = check_gate(gate, x, experts, weight.shape[0], task_ids, expert_ids)
    weights = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    low_rank.check_placement(x, weights, {"gate": gate, **others})
    scaling = as_number("scaling", scaling)
    if scaling != 1.0:
        given = given._replace(weights=gate * scaling)
    chosen = choose_backend(backend, "mixture_of_lora_linear", x.device, low_rank.why_unsupported(x))
    on_kernels = chosen == "triton" and x.numel() > 0 and weight.shape[0] > 0 and gate.numel() > 0
    if update_input is not None or not on_kernels:
        mixture = add_by_kernels if on_kernels else plain.compose
        read = x if update_input is None else update_input
        return mixture(read, adapters, given, F.linear(x, weight, bias), relu=False)
    rows, cast = low_rank.cast_for_kernels(x, (weight, bias, lora_a, lora_b))
    kernel_gate = flatten_gate(given, x.shape[:-1], experts)
    arguments = [rows, *cast, kernel_gate.gate, kernel_gate.ids, kernel_gate.form, kernel_gate.rows_per_gate]
    if needs_dispatch(rows, *cast, kernel_gate.gate):
        out, _ = forward_op(*arguments)
    else:
        out, _ = launch_forward(*_bundle(*arguments), save=False)
    return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
