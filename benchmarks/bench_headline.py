"""The ledger's rows (`benchmarks.harness.headline`): every operator at LION-FlanT5-XL's sizes and its best peers.

`pytest benchmarks/bench_headline.py` prints the table: on a GPU in bf16, as CUDA graphs with a cold cache, with mixed
tasks. "products" is an expert's version of the same mathematics with the library's matrix products alone: gates are
folded into the weights or the hidden channels. On a CPU it is a dry run at small sizes (`--quick`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import (
    bench_assemble_inputs,
    bench_gated_gelu,
    bench_mixture_of_adapters,
    bench_mixture_of_lora_linear,
    bench_multi_scale_attention,
    bench_relative_bias_attention,
    bench_residual_layer_norm,
    bench_rms_norm,
)
from benchmarks.harness.headline import HEADLINES, SUITE, Headline
from benchmarks.harness.side_by_side import COMPILE_ONLY, INTERLEAVED, SECONDS, Operator, Shape, Suite, measure
from benchmarks.shapes import COMPILED, COMPILES, ON_GPU
from lion_kernels.core.backend import interpreting

BACKEND = "triton" if ON_GPU or interpreting() else "torch"
OURS = f"lion_kernels-{BACKEND}"
# Sizes of a dry run on a CPU, in place of those of a GPU.
SMALL = {
    "batch": 2, "images": 2, "heads": 2, "length": 6, "tokens": 9, "queries": 9, "keys": 17, "prefix": 5,
    "channels": 64, "experts": 2, "rank": 8,
}  # fmt: skip
ROWS = tuple(headline for headline in HEADLINES if headline.suite == SUITE)
pytestmark = INTERLEAVED


def sizes(headline: Headline) -> dict[str, Any]:
    shape = dict(headline.shape)
    if ON_GPU:
        return shape
    return {name: min(value, SMALL[name]) if name in SMALL else value for name, value in shape.items()}


def dense_gate(gate: Tensor, expert_ids: Tensor, experts: int) -> Tensor:
    return gate.new_zeros(*gate.shape[:-1], experts).scatter(-1, expert_ids, gate)


def low_rank_products(
    hidden: Tensor, up: Tensor, gate: Tensor, task_ids: Tensor | None, expert_ids: Tensor | None, added: Tensor
) -> Tensor:
    """Return added + sum_e g_e up_e hidden_e as one product, from hidden [B, L, E, r] and up [E, D, r]."""
    if task_ids is not None:  # one weight per task: [R, D, E*r]
        weights = (gate.unsqueeze(-1) * up).transpose(1, 2).flatten(2)
        return torch.baddbmm(added, hidden.flatten(2), weights[task_ids].transpose(1, 2))
    assert expert_ids is not None
    weighed = hidden * dense_gate(gate, expert_ids, len(up)).unsqueeze(-1)
    weights = up.transpose(0, 1).flatten(1)
    return torch.addmm(added.flatten(0, 1), weighed.flatten(2).flatten(0, 1), weights.T).view_as(added)


def adapters_by_products(
    x, down_weight, up_weight, down_bias, up_bias, gate, residual, task_ids=None, expert_ids=None
) -> Tensor:
    hidden = F.linear(x, down_weight.flatten(0, 1), down_bias.flatten()).relu().unflatten(-1, down_bias.shape)
    if task_ids is not None:
        added = residual + (gate * up_bias).sum(1)[task_ids].unsqueeze(1)
    else:
        added = residual + dense_gate(gate, expert_ids, len(up_bias)) @ up_bias
    return low_rank_products(hidden, up_weight, gate, task_ids, expert_ids, added)


def lora_by_products(x, weight, lora_a, lora_b, gate, task_ids=None, expert_ids=None) -> Tensor:
    hidden = F.linear(x, lora_a.flatten(0, 1)).unflatten(-1, lora_a.shape[:2])
    return low_rank_products(hidden, lora_b, gate, task_ids, expert_ids, F.linear(x, weight))


def adapters_one_by_one(
    x, down_weight, up_weight, down_bias, up_bias, gate, residual, task_ids=None, expert_ids=None
) -> Tensor:
    """Compute the original's form, for a batch that mixes tasks."""
    factors = gate[task_ids] if expert_ids is None else dense_gate(gate, expert_ids, len(up_weight))
    out = residual
    for e in range(len(up_weight)):
        update = F.linear(F.relu(F.linear(x, down_weight[e], down_bias[e])), up_weight[e], up_bias[e])
        out = out + (factors[:, e].unsqueeze(1) if expert_ids is None else factors[..., e : e + 1]) * update
    return out


def lora_one_by_one(x, weight, lora_a, lora_b, gate, task_ids=None, expert_ids=None) -> Tensor:
    factors = gate[task_ids] if expert_ids is None else dense_gate(gate, expert_ids, len(lora_b))
    out = F.linear(x, weight)
    for e in range(len(lora_b)):
        update = F.linear(F.linear(x, lora_a[e]), lora_b[e])
        out = out + (factors[:, e].unsqueeze(1) if expert_ids is None else factors[..., e : e + 1]) * update
    return out


def mixture(suite: Suite, one_by_one: Operator, products: Operator) -> Suite:
    peers = {"eager": one_by_one, "products": products, "torch.compile": torch.compile(products)}
    return replace(suite, operators={**peers, OURS: suite.operators[OURS]})


def adapters(shape: Shape) -> Suite:
    return mixture(bench_mixture_of_adapters.suite(shape), adapters_one_by_one, adapters_by_products)


def lora(shape: Shape) -> Suite:
    return mixture(bench_mixture_of_lora_linear.suite(shape), lora_one_by_one, lora_by_products)


def attention(shape: Shape) -> Suite:
    suite = bench_multi_scale_attention.suite(shape)
    # On a GPU, SDPA selects one of its backends, which are all listed.
    left_out = ("SDPA",) if ON_GPU else ()
    return replace(suite, operators={name: peer for name, peer in suite.operators.items() if name not in left_out})


def layer_norm(shape: Shape) -> Suite:
    """Return the suite, checked without dropout and timed with it."""
    suite, p = bench_residual_layer_norm.suite(shape), shape["dropout"]

    def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        summed = F.dropout(x + x_bias, p) + residual
        return F.layer_norm(summed, weight.shape, weight, bias, bench_residual_layer_norm.EPS)

    ours = partial(suite.operators[OURS], dropout_p=p, seed=0)
    timed: dict[str, Operator] = {"eager": dropped, "torch.compile": torch.compile(dropped), OURS: ours}
    return replace(suite, operators={name: suite.operators[name] for name in timed}, timed=timed)


SUITES: dict[str, Callable[[Shape], Suite]] = {
    "mixture_of_adapters": adapters,
    "mixture_of_lora_linear": lora,
    "multi_scale_attention": attention,
    # Without the table's gradient, as in LION's frozen language model.
    "relative_bias_attention": partial(bench_relative_bias_attention.suite, learn_bias=False),
    "rms_norm": bench_rms_norm.suite,
    "residual_layer_norm": layer_norm,
    "gated_gelu": bench_gated_gelu.suite,
    "assemble_inputs": bench_assemble_inputs.suite,
}


def suite_of(headline: Headline) -> Suite:
    """Return the peers of an operator's own suite that are measured here, with this suite's form of ours alone."""
    suite = SUITES[headline.operator](sizes(headline))
    left_out = () if COMPILES else COMPILED
    peers = {name: op for name, op in suite.operators.items() if not name.startswith("lion") and name not in left_out}
    # Backward is not requested unless it is measured, because a peer might lack it.
    forward_only = frozenset((*peers, OURS)) if headline.directions == ("forward",) else suite.forward_only
    return replace(suite, name=SUITE, operators={**peers, OURS: suite.operators[OURS]}, forward_only=forward_only)


@pytest.mark.parametrize(
    ("row", "direction", "peer"),
    [
        pytest.param(row, direction, peer, id=f"{row.operator}: {row.label}-{direction}-{peer}")
        for row in ROWS
        for direction in row.directions
        for peer in suite_of(row).operators
    ],
)
def bench(benchmark: Callable, row: Headline, direction: str, peer: str) -> None:
    if not ON_GPU and SECONDS > 0:
        pytest.skip("a GPU's shapes; on a CPU `python -m benchmarks.harness run headline --quick` runs small ones")
    if COMPILE_ONLY and direction != row.directions[0]:
        pytest.skip("both directions are compiled together")
    measure(benchmark, suite_of(row), peer, direction, {"operator": row.operator, **sizes(row)})
