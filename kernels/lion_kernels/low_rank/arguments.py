"""What the arguments of a linear layer with a mixture of LoRA may be."""

from torch import Tensor

from lion_kernels.core.arguments import FLOATING
from lion_kernels.low_rank.launch import check_experts


def check_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, update_input: Tensor | None
) -> None:
    """Raise ValueError for shapes and dtypes that do not fit together; the message names the argument."""
    if x.dim() == 0 or x.dtype not in FLOATING:
        raise ValueError(f"x: expected floating [..., Din], got {x.dtype} {list(x.shape)}")
    width = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight: expected [Dout, {width}] (Din from x), got {list(weight.shape)}")
    if lora_a.dim() != 3 or lora_a.shape[2] != width:
        raise ValueError(f"lora_a: expected [E, r, {width}] (Din from x), got {list(lora_a.shape)}")
    check_experts("lora_a", lora_a)
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
