"""A linear layer with a gated mixture of low-rank updates (LoRA, arXiv 2106.09685; top-k: LLaVA-MoLE, 2401.16160).

y = x W^T + b + scaling * sum_e g_e * (x A_e^T) B_e^T
"""

from einops import einsum
from torch import Tensor

from .gates import expand_gate


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
) -> Tensor:
    """Compute a linear layer plus E gated updates of rank r; all tensors have one floating-point dtype.

    Args:
        x: [..., Din].
        weight, bias: [Dout, Din], [Dout] or None.
        lora_a, lora_b: [E, r, Din], [E, Dout, r].
        update_input: [..., Din], read by the updates instead of x (LoRA's dropout).
        gate: [R, E, Dout] with `task_ids`, [..., k] with `expert_ids`, [..., E] with neither (see `expand_gate`).

    Returns: [..., Dout].
    Raises ValueError if a shape or an id does not match.
    """
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected [Dout, {x.shape[-1]}] (Din from x), got {list(weight.shape)}")
    width_out, width_in = weight.shape
    if lora_a.ndim != 3 or lora_a.shape[2] != width_in:
        raise ValueError(f"lora_a: expected [E, r, {width_in}] (Din from x), got {list(lora_a.shape)}")
    num_experts, rank, _ = lora_a.shape
    if lora_b.shape != (num_experts, width_out, rank):
        raise ValueError(f"lora_b: expected {[num_experts, width_out, rank]}, got {list(lora_b.shape)}")
    if bias is not None and bias.shape != (width_out,):
        raise ValueError(f"bias: expected {[width_out]}, got {list(bias.shape)}")
    factor = expand_gate(gate, x.shape[:-1], num_experts, width_out, task_ids=task_ids, expert_ids=expert_ids)
    low_rank = einsum(x if update_input is None else update_input, lora_a, "... i, e r i -> ... e r")
    update = einsum(low_rank, lora_b, "... e r, e o r -> ... e o")
    out = x @ weight.T + scaling * (factor * update).sum(-2)
    return out if bias is None else out + bias
