"""The mixture of adapters, forward, backward and both, compared with the original's eager form.

`pytest benchmarks` prints the table. The base is LION-FlanT5-XL's (D 2048, rank 64, 2 adapters) with channel gates by
task; tokens, channels, adapters and rank vary one at a time.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.side_by_side import DEVICE, DTYPE, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import by_backend, compare_peers, mixtures, sequences
from lion_kernels import mixture_of_adapters
from lion_kernels.mixture_of_adapters import cost
from lion_reference import mixture_of_adapters as reference

BASE = {"channels": 2048, "experts": 2, "rank": 64}
TASKS = 2


def gate_of(shape: Shape, generator: torch.Generator) -> Inputs:
    """Return channel gates per task, or the weights of k experts per row."""
    (batch, length), experts = sequences(shape), shape["experts"]
    if shape.get("gate") == "sparse":
        scores = draw(batch, length, experts, generator=generator)
        values, ids = scores.softmax(-1).topk(shape["chosen"])
        return {"gate": leaf(values), "expert_ids": ids}
    tasks = torch.arange(batch) % TASKS if shape.get("tasks") == "mixed" else torch.ones(batch, dtype=torch.int64)
    gate = draw(TASKS, experts, shape["channels"], generator=generator)
    return {"gate": leaf(gate), "task_ids": tasks.to(DEVICE)}


def make_inputs(shape: Shape) -> Inputs:
    generator = seeded()
    batch, length = sequences(shape)
    channels, experts, rank = (shape[name] for name in BASE)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return leaf(draw(*size, generator=generator, scale=scale))

    return {
        "x": randn(batch, length, channels),
        "down_weight": randn(experts, rank, channels, scale=channels**-0.5),
        "down_bias": randn(experts, rank),
        "up_weight": randn(experts, channels, rank, scale=rank**-0.5),
        "up_bias": randn(experts, channels),
        **gate_of(shape, generator),
        "residual": randn(batch, length, channels),
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


def suite(shape: Shape) -> Suite:
    batch, length = sequences(shape)
    costs = cost(batch * length, shape["channels"], shape.get("chosen", shape["experts"]), shape["rank"], DTYPE)
    return Suite("mixture_of_adapters", PEERS, reference, reference, partial(make_inputs, shape), costs)


bench = compare_peers(suite, mixtures(BASE), BASE)
