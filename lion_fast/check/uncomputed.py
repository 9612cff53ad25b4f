"""Models of the published sizes on the CPU without their arithmetic: the code runs, and large values are not computed.

Unlike PyTorch's fake tensors, these have memory, so that code that inspects addresses and strides, such as Triton's
launcher, works as usual. The memory is never written, so the operating system never allocates it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

LARGE = 2**16  # values; smaller tensors, such as masks and lengths, are computed


class Uncomputed(TorchDispatchMode):
    """Within this mode, operators with a large floating tensor argument return results of the right form.

    Large results have no values, others are zero. Views remain views, in-place operators leave their argument
    unchanged, and operators of lion_kernels run, so that a recorder can record their launches.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lion_kernels":
            with self:  # do not compute the operators they call either
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        returned = [value.alias_info for value in func._schema.returns]
        if returned and all(alias is not None and not alias.is_write for alias in returned):
            return func(*args, **kwargs)  # a view
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if not any(_is_large(value) for value in given) and not _makes_large(func, args, kwargs):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(Tensor, _unwritten, _forms(func, args, kwargs))


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > LARGE


def _makes_large(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether the function creates a large tensor from sizes alone, like `torch.randn`."""
    return _takes_device(func) and any(_is_large(value) for value in tree_flatten(_forms(func, args, kwargs))[0])


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _forms(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of `func` as tensors without memory."""
    args, kwargs = tree_map_only(Tensor, _form, (args, kwargs))
    if _takes_device(func):
        kwargs = {**kwargs, "device": torch.device("meta")}
    if "generator" in kwargs:
        kwargs = {**kwargs, "generator": None}
    return func(*args, **kwargs)


def _form(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _unwritten(form: Tensor) -> Tensor:
    """Return a tensor of this shape, strides and dtype: zeros, or unwritten memory if it is large."""
    last = sum((size - 1) * stride for size, stride in zip(form.shape, form.stride(), strict=True))
    make = torch.empty if _is_large(form) else torch.zeros
    return make(last + 1 if form.numel() else 0, dtype=form.dtype).as_strided(form.shape, form.stride())
