"""What a call of a whole model has to do at least: the operations of its matrix products, and reading their weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lion_kernels.cost import Cost


def work(call: Callable[[], Any], weights: Iterable[Tensor]) -> Cost:
    """The products that `call` runs in plain PyTorch; what else moves than `weights` is left out, so it is a bound."""
    counter = _Products({weight.untyped_storage().data_ptr() for weight in weights})
    with counter:
        call()
    return Cost(counter.bytes, counter.flops)


class _Products(TorchDispatchMode):
    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights = weights
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
            read = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.bytes += sum(arg.nbytes for arg in read if arg.untyped_storage().data_ptr() in self.weights)
        return out
