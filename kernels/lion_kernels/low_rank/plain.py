"""What `lion_kernels.low_rank.launch` computes, in PyTorch: what a CPU runs that does not interpret."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.low_rank.gates import KernelGate
from lion_kernels.low_rank.launch import Gradients


def plain_forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate: KernelGate,
    residual: Tensor | None,
    relu: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """`lion_kernels.low_rank.launch.forward`."""
    hidden = F.linear(x, down_weight.flatten(0, 1), None if down_bias is None else down_bias.flatten())
    if relu:
        hidden = F.relu(hidden)
    by_expert = hidden.unflatten(-1, down_weight.shape[:2])
    factor = _plain_factor(gate, x.shape[0]).to(x.dtype)
    if gate.form == "channel":
        update = torch.einsum("ter,enr->ten", by_expert, up_weight)
        update = update if up_bias is None else update + up_bias
        out = (factor * update).sum(1)
    else:
        out = torch.einsum("ter,enr->tn", factor.unsqueeze(-1) * by_expert, up_weight)
        out = out if up_bias is None else out + factor @ up_bias
    return out if residual is None else residual + out, hidden if keep_hidden else None


def plain_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate: KernelGate,
    relu: bool,
    needs: Sequence[bool],
) -> Gradients:
    """`lion_kernels.low_rank.launch.backward`."""
    grad = grad.to(x.dtype)
    factor = _plain_factor(gate, x.shape[0]).to(x.dtype)
    by_expert = hidden.unflatten(-1, down_weight.shape[:2])
    if gate.form == "channel":
        assert gate.ids is not None
        rows_of_task = F.one_hot(gate.ids.long(), gate.gate.shape[0]).repeat_interleave(gate.rows_per_gate, 0)
        rows_of_task = rows_of_task.to(x.dtype)
        product = torch.einsum("tq,tn,ter->qenr", rows_of_task, grad, by_expert)
        total = torch.einsum("tq,tn->qn", rows_of_task, grad)
        dhidden = torch.einsum("ten,tn,enr->ter", factor, grad, up_weight)
        dup_weight = torch.einsum("qen,qenr->enr", gate.gate.to(x.dtype), product)
        dup_bias = torch.einsum("qen,qn->en", gate.gate.to(x.dtype), total)
        dgate = torch.einsum("qenr,enr->qen", product, up_weight)
        dgate = dgate if up_bias is None else dgate + up_bias * total.unsqueeze(1)
    else:
        per_weight = torch.einsum("tn,enr->ter", grad, up_weight)
        dhidden = per_weight * factor.unsqueeze(-1)
        dup_weight = torch.einsum("tn,ter->enr", grad, by_expert * factor.unsqueeze(-1))
        dup_bias = factor.t() @ grad
        dgate = (per_weight * by_expert).sum(-1)
        dgate = dgate if up_bias is None else dgate + grad @ up_bias.t()
        dgate = dgate.view(-1, gate.rows_per_gate, dgate.shape[-1]).sum(1)
    dhidden = dhidden.flatten(1)
    if relu:
        dhidden = dhidden * (hidden > 0)
    needs_hidden, needs_down_weight, needs_down_bias, needs_up_weight, needs_up_bias, needs_gate = needs
    return Gradients(
        dhidden if needs_hidden else None,
        (dhidden.t() @ x).view(down_weight.shape) if needs_down_weight else None,
        dhidden.sum(0).view(down_weight.shape[:2]) if needs_down_bias else None,
        dup_weight if needs_up_weight else None,
        dup_bias if needs_up_bias else None,
        dgate.to(gate.gate.dtype) if needs_gate else None,
    )


def _plain_factor(gate: KernelGate, rows: int) -> Tensor:
    """[T, E, N] of a channel gate, else [T, E]."""
    if gate.form == "channel":
        assert gate.ids is not None
        return gate.gate[gate.ids.long()].repeat_interleave(gate.rows_per_gate, 0)
    return gate.gate.repeat_interleave(gate.rows_per_gate, 0)
