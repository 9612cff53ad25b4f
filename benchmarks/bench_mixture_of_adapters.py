"""The mixture of adapters, forward, backward and both, compared with the original's eager form.

`pytest benchmarks` prints the table. The base is LION-FlanT5-XL's (D 2048, rank 64, 2 adapters) with channel gates by
task; tokens, channels, adapters and rank vary one at a time.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.side_by_side import (
    DEVICE,
    DTYPE,
    INTERLEAVED,
    Inputs,
    Operator,
    Suite,
    draw,
    leaf,
    measure,
    seeded,
)
from benchmarks.shapes import by_backend, cases, compiled_at_base, mixtures, sequences
from lion_kernels import mixture_of_adapters
from lion_kernels.mixture_of_adapters import cost
from lion_reference import mixture_of_adapters as reference

BASE = {"channels": 2048, "experts": 2, "rank": 64}
TASKS = 2
pytestmark = INTERLEAVED


def make_inputs(shape: dict[str, int]) -> Inputs:
    generator = seeded()
    batch, length = sequences(shape["tokens"])
    channels, experts, rank = (shape[name] for name in BASE)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return leaf(draw(*size, generator=generator, scale=scale))

    return {
        "x": randn(batch, length, channels),
        "down_weight": randn(experts, rank, channels, scale=channels**-0.5),
        "down_bias": randn(experts, rank),
        "up_weight": randn(experts, channels, rank, scale=rank**-0.5),
        "up_bias": randn(experts, channels),
        "gate": randn(TASKS, experts, channels),
        "residual": randn(batch, length, channels),
        "task_ids": torch.ones(batch, dtype=torch.int64, device=DEVICE),
    }


def eager(x, down_weight, down_bias, up_weight, up_bias, gate, residual, task_ids) -> Tensor:
    """Compute adapter by adapter, with one task for the whole batch, as in the original."""
    out = residual
    for e in range(len(up_weight)):
        update = F.linear(F.relu(F.linear(x, down_weight[e], down_bias[e])), up_weight[e], up_bias[e])
        out = out + gate[1, e] * update
    return out


PEERS: dict[str, Operator] = {
    "eager": eager,
    "torch.compile": torch.compile(reference),
    **by_backend(mixture_of_adapters),
}


def peers(shape: dict[str, int]) -> dict[str, Operator]:
    return compiled_at_base(PEERS, shape, BASE)


@cases(mixtures(BASE), peers)
def bench(benchmark: Callable, shape: dict[str, int], direction: str, peer: str) -> None:
    suite = Suite("mixture_of_adapters", peers(shape), plain=reference, reference=reference)
    costs = cost(shape["tokens"], *(shape[name] for name in BASE), DTYPE)
    measure(benchmark, suite, peer, direction, shape, partial(make_inputs, shape), costs)
