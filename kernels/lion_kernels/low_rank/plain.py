"""The mixture in PyTorch: `compose` for autograd, and the custom ops on a CPU without the interpreter.

A weight per row and expert commutes with the up-projection, so the dense and sparse forms are one product over E * r
inner channels. A weight per output channel does not commute, so the channel form adds the experts one by one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core.backend import autocast_dtype
from lion_kernels.low_rank.adapters import Adapters
from lion_kernels.low_rank.gates import Gate, KernelGate, align_left, dense_from_sparse
from lion_kernels.low_rank.launch import Gradients


def plain_forward(
    x: Tensor, adapters: Adapters, gate: KernelGate, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """Compute `lion_kernels.low_rank.launch.launch_forward` and the tensors it saves in PyTorch."""
    down_weight, down_bias, up_weight, up_bias = adapters
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
    return out if residual is None else residual + out, hidden


def plain_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    adapters: Adapters,
    gate: KernelGate,
    relu: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Compute `lion_kernels.low_rank.launch.launch_backward` in PyTorch."""
    down_weight, _, up_weight, up_bias = adapters
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
    found = (
        dhidden if needs_hidden else None,
        (dhidden.t() @ x).view(down_weight.shape) if needs_down_weight else None,
        dhidden.sum(0).view(down_weight.shape[:2]) if needs_down_bias else None,
        dup_weight if needs_up_weight else None,
        dup_bias if needs_up_bias else None,
        dgate.to(gate.gate.dtype) if needs_gate else None,
    )
    # `einsum` permutes strides as it likes; the kernels and the fakes do not.
    return Gradients(*(None if gradient is None else gradient.contiguous() for gradient in found))


def _plain_factor(gate: KernelGate, rows: int) -> Tensor:
    """Return the gate as a factor: [T, E, N] for a channel gate, else [T, E]."""
    if gate.form == "channel":
        assert gate.ids is not None
        return gate.gate[gate.ids.long()].repeat_interleave(gate.rows_per_gate, 0)
    return gate.gate.repeat_interleave(gate.rows_per_gate, 0)


def compose(x: Tensor, adapters: Adapters, given: Gate, residual: Tensor | None, relu: bool) -> Tensor:
    """Compute the mixture in PyTorch, differentiable by autograd."""
    down_weight, down_bias, up_weight, up_bias = adapters
    form, gate, task_ids, expert_ids = given
    experts, rank, _ = down_weight.shape
    hidden = F.linear(x, down_weight.flatten(0, 1), None if down_bias is None else down_bias.flatten())
    if relu:
        hidden = F.relu(hidden)
    hidden = hidden.unflatten(-1, (experts, rank))
    leading = x.dim() - 1
    if form == "channel":
        assert task_ids is not None
        # PyTorch would index with a tensor [] by its value on the host.
        factor = gate[task_ids.long()] if task_ids.dim() else gate[task_ids.long().view(1)].squeeze(0)
        if x.dim() == 3 and task_ids.shape == x.shape[:1] and x.shape[1] > rank:
            out = _add_by_sequence(hidden, up_weight, up_bias, factor, residual)
        else:
            factor = align_left(factor, leading, trailing=2)  # [..., E, D]
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
    """Add one product per sequence over E * r inner channels, with the gate [B, E, D] folded into the up-projection.

    The gradients of the weights and the gate then follow `low_rank.launch`: no tensor as large as x is saved or read
    for them. Folding does not pay off for sequences no longer than the rank.
    """
    weight = (factor.unsqueeze(-1) * up_weight).transpose(1, 2).flatten(2).mT  # [B, E * r, D]
    bias = None if up_bias is None else (factor * up_bias).sum(1, keepdim=True)  # [B, 1, D]
    inner = hidden.flatten(-2)
    if residual is None or autocast_dtype(inner) is not None or not residual.dtype == weight.dtype == inner.dtype:
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
    inner = (hidden * weights.unsqueeze(-1)).to(hidden.dtype).flatten(-2)  # [..., E * r]
    out = F.linear(inner, up_weight.transpose(0, 1).flatten(1))
    if up_bias is not None:
        out = out + weights.to(up_bias.dtype) @ up_bias
    return out if residual is None else residual + out
