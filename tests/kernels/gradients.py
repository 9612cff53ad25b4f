"""What the kernels' tests do alike: inputs in another dtype, and outputs with all gradients."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # arguments by name


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device | str | None = None) -> Inputs:
    """Floating tensors as leaves of `dtype`, other tensors as they are, all on `device`; what is no tensor stays."""
    return {
        name: value
        if not isinstance(value, Tensor)
        else value.detach().to(device, dtype).requires_grad_()
        if value.is_floating_point()
        else value.to(device)
        for name, value in inputs.items()
    }


def gradient_of(out: Tensor) -> Tensor:
    """The same values in every dtype."""
    return _drawn(out.shape, out.device).to(out.dtype)


@functools.lru_cache(maxsize=2)
def _drawn(shape: torch.Size, device: torch.device) -> Tensor:
    """Kept, as 200 equal calls use them: a CPU takes longer to draw values for a GPU than the GPU to use them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)


def outputs_and_gradients(operator: Callable[..., Tensor], inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    """ "out", and the gradient of every input that asks for one, by name."""
    out = operator(**inputs, **options)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(out, [inputs[name] for name in names], gradient_of(out))
    return {"out": out, **dict(zip(names, gradients, strict=True))}
