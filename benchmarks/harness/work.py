"""Times of whole-model calls in turns, and their lower bounds.

The bound covers the operations of the matrix products and reading their weights.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.side_by_side import DEVICE, DTYPE, alternate, rates
from lion_kernels.core.cost import Cost, floor_seconds


class Timed(NamedTuple):
    """The calls' times in seconds by rounds and peak memory in bytes, and the floor in seconds."""

    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    floor: float


def timed(calls: Mapping[str, Callable[[], Any]], original: Iterable[Tensor], seconds: float) -> Timed:
    """Run `calls` in turns for about `seconds`; the floor is that of the call named "original" with its weights."""
    peaks = {name: peak_bytes(call, DEVICE) for name, call in calls.items()}
    floor = floor_seconds(work(calls["original"], original), rates(), DTYPE)
    return Timed(alternate(calls, seconds), peaks, floor)


def work(call: Callable[[], Any], weights: Iterable[Tensor]) -> Cost:
    """Return the cost of `call`'s products in plain PyTorch; a lower bound, since only `weights` count as traffic."""
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
