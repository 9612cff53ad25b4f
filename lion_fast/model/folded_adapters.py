"""A mixture of adapters with constant weights: everything that depends on the weights alone is computed once.

The gate g_k[t] = scale_k * ratio_k[t] of adapter k for task t is folded into the up-projections (section 3.3):

    sum_k g_k[t] * (W_up_k ReLU(W_down_k h + b_down_k) + b_up_k)  =  U[t] ReLU(D h + d) + u[t]

    D = [W_down_0; W_down_1]            U[t] = [g_0[t] W_up_0 | g_1[t] W_up_1]
    d = [b_down_0; b_down_1]            u[t] = g_0[t] b_up_0 + g_1[t] b_up_1

The results are non-persistent buffers: they move with the model and are not saved.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_kernels import mixture_of_adapters


class FoldedAdapters(nn.Module):
    """residual + U[t] ReLU(D h + d) + u[t] in PyTorch; one product serves all tasks, so a batch may mix them.

    Args:
        down_weight: [E, r, D].
        down_bias: [E, r].
        up_weight: [E, D, r].
        up_bias: [E, D].
        gate: [R, E, D] for R tasks, or [E] for a gate that does not depend on the task.
    """

    down_weight: Tensor  # [E * r, D]
    down_bias: Tensor  # [E * r]
    up_weight: Tensor  # [D, R * E * r]
    up_bias: Tensor  # [R, D]

    def __init__(self, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor, gate: Tensor):
        super().__init__()
        exact = torch.promote_types(gate.dtype, torch.float32)
        gates = (gate.view(1, -1, 1) if gate.dim() == 1 else gate).to(exact)  # [R, E, D or 1]
        gated_weight = gates.unsqueeze(-1) * up_weight.to(exact)  # [R, E, D, r]
        gated_bias = gates * up_bias.to(exact)  # [R, E, D]
        self.num_tasks = len(gates)
        self.register_buffer("down_weight", down_weight.flatten(0, 1), persistent=False)
        self.register_buffer("down_bias", down_bias.flatten(), persistent=False)
        gated_weight = gated_weight.permute(2, 0, 1, 3).flatten(1).to(up_weight.dtype)
        self.register_buffer("up_weight", gated_weight, persistent=False)
        self.register_buffer("up_bias", gated_bias.sum(1).to(up_bias.dtype), persistent=False)

    def forward(self, hidden_states: Tensor, residual: Tensor, task_ids: Tensor | None) -> Tensor:
        """Add the adapters' output to `residual`.

        Args:
            hidden_states, residual: [B, L, D].
            task_ids: int64 [B], or None for a gate that does not depend on the task.

        Returns:
            [B, L, D], in the residual's dtype.
        """
        operands = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        hidden_states, operands = in_one_dtype(hidden_states, residual, operands)
        down_weight, down_bias, up_weight, up_bias = operands
        hidden = F.relu(F.linear(hidden_states, down_weight, down_bias))
        if task_ids is None:
            update = F.linear(hidden, up_weight, up_bias[0])
        else:
            task_ids = task_ids.long()
            own_task = F.one_hot(task_ids, self.num_tasks).to(hidden.dtype)  # [B, R]
            by_task = (own_task[:, None, :, None] * hidden.unsqueeze(2)).flatten(2)  # [B, L, R * E * r]
            update = F.linear(by_task, up_weight) + up_bias[task_ids].unsqueeze(1)
        return (residual + update).to(residual.dtype)


class StackedAdapters(nn.Module):
    """The stacked operands of the kernel, which applies the gate of each row's task as it reads the up-projection.

    Args:
        operands: `down_weight`, `down_bias`, `up_weight`, `up_bias` and `gate`, as for `FoldedAdapters`.
        kernel_backend: backend of `mixture_of_adapters`.
    """

    def __init__(self, *operands: Tensor, kernel_backend: str):
        super().__init__()
        self.kernel_backend = kernel_backend
        names = ("down_weight", "down_bias", "up_weight", "up_bias", "gate")
        for name, operand in zip(names, operands, strict=True):
            self.register_buffer(name, operand, persistent=False)

    def forward(self, hidden_states: Tensor, residual: Tensor, task_ids: Tensor | None) -> Tensor:
        """Add the adapters' output to `residual`, as `FoldedAdapters` does."""
        hidden_states, operands = in_one_dtype(hidden_states, residual, tuple(self.buffers()))
        out = mixture_of_adapters(
            hidden_states, *operands, task_ids=task_ids, residual=residual, backend=self.kernel_backend
        )
        return out.to(residual.dtype)


def in_one_dtype(
    hidden_states: Tensor, residual: Tensor, operands: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return hidden states and operands in the widest of their dtypes and the residual's; autocast casts operands.

    In a float16 model, transformers keeps T5's `wo` and with it the residual stream in float32. The adapters read the
    stream before its norm, and its values may be too large for float16.
    """
    dtype = hidden_states.dtype
    if residual.dtype == dtype and all(operand.dtype == dtype for operand in operands):
        return hidden_states, operands  # the usual case, without the cost of calls
    dtype = torch.promote_types(dtype, residual.dtype)
    if torch.is_autocast_enabled(hidden_states.device.type):
        return hidden_states.to(dtype), operands
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return hidden_states.to(dtype), tuple(operand.to(dtype) for operand in operands)
