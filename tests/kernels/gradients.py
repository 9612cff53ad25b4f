"""Helpers for the kernels' tests: inputs in another dtype, and outputs with all gradients."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # arguments by name


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device | str | None = None) -> Inputs:
    """Return the inputs with tensors on `device`, floating ones as leaves of `dtype`; other values are unchanged."""
    return {
        name: value
        if not isinstance(value, Tensor)
        else value.detach().to(device, dtype).requires_grad_()
        if value.is_floating_point()
        else value.to(device)
        for name, value in inputs.items()
    }


def gradient_of(out: Tensor) -> Tensor:
    """Return a gradient for `out`, with the same values in every dtype."""
    return _drawn(out.shape, out.device).to(out.dtype)


@functools.lru_cache(maxsize=2)
def _drawn(shape: torch.Size, device: torch.device) -> Tensor:
    """Cached for 200 equal calls: drawing values on the CPU takes longer than using them on a GPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)


def outputs_and_gradients(operator: Callable[..., Tensor], inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    """Return "out" and, by name, the gradient of every input that requires one."""
    out = operator(**inputs, **options)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(out, [inputs[name] for name in names], gradient_of(out))
    return {"out": out, **dict(zip(names, gradients, strict=True))}
