"""The ledger's rows (`benchmarks.harness.headline`): every operator at LION-FlanT5-XL's sizes and its best peers.

`pytest benchmarks/bench_headline.py` prints the table: on a GPU in bf16, as CUDA graphs with a cold cache, with mixed
tasks. "products" is an expert's version of the same mathematics with the library's matrix products alone: gates are
folded into the weights or the hidden channels. On a CPU it is a dry run at small sizes (`--quick`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lion_kernels
import lion_reference
from benchmarks import bench_assemble_inputs, bench_gated_gelu, bench_residual_layer_norm, bench_rms_norm
from benchmarks.bench_multi_scale_attention import PEERS as ATTENTION
from benchmarks.bench_multi_scale_attention import gathered
from benchmarks.bench_relative_bias_attention import BUCKETS, in_decoder
from benchmarks.bench_relative_bias_attention import PEERS as BIASED_ATTENTION
from benchmarks.harness.headline import HEADLINES, SUITE, Headline
from benchmarks.harness.side_by_side import (
    COMPILE_ONLY,
    DEVICE,
    DTYPE,
    FLEX_FORWARD,
    INTERLEAVED,
    SECONDS,
    Inputs,
    Operator,
    Suite,
    draw,
    leaf,
    measure,
    seeded,
)
from benchmarks.shapes import COMPILES, ON_GPU
from lion_kernels.assemble_inputs import cost as assemble_cost
from lion_kernels.core.backend import interpreting
from lion_kernels.core.cost import Cost
from lion_kernels.gated_gelu import cost as gelu_cost
from lion_kernels.mixture_of_adapters import cost as adapters_cost
from lion_kernels.mixture_of_lora_linear import cost as lora_cost
from lion_kernels.multi_scale_attention import cost as attention_cost
from lion_kernels.relative_bias_attention import cost as biased_attention_cost
from lion_kernels.residual_layer_norm import cost as layer_norm_cost
from lion_kernels.rms_norm import cost as rms_norm_cost

BACKEND = "triton" if ON_GPU or interpreting() else "torch"
OURS = f"lion_kernels-{BACKEND}"
# Sizes of a dry run on a CPU, in place of those of a GPU.
SMALL = {
    "batch": 2, "images": 2, "heads": 2, "length": 6, "tokens": 9, "queries": 9, "keys": 17, "prefix": 5,
    "channels": 64, "experts": 2, "rank": 8,
}  # fmt: skip
TASKS = 2
ROWS = tuple(headline for headline in HEADLINES if headline.suite == SUITE)
pytestmark = INTERLEAVED


class Case(NamedTuple):
    """The ingredients of a row's measurement."""

    suite: Suite
    make_inputs: Callable[[], Inputs]
    costs: Sequence[Cost]


def sizes(headline: Headline) -> dict[str, Any]:
    shape = dict(headline.shape)
    if ON_GPU:
        return shape
    return {name: min(value, SMALL[name]) if name in SMALL else value for name, value in shape.items()}


# ---------------------------------------------------------------- mixtures


def gate_of(shape: Mapping[str, Any], generator: torch.Generator) -> Inputs:
    """Return channel gates per task, or the weights of k experts per row."""
    batch, length, experts = shape["batch"], shape["length"], shape["experts"]
    if shape["gate"] == "channel":
        ids = torch.arange(batch, device=DEVICE) % TASKS if shape["tasks"] == "mixed" else torch.ones(batch).long()
        return {"gate": leaf(draw(TASKS, experts, shape["channels"], generator=generator)), "task_ids": ids.to(DEVICE)}
    scores = draw(batch, length, experts, generator=generator)
    values, ids = scores.softmax(-1).topk(shape["chosen"])
    return {"gate": leaf(values), "expert_ids": ids}


def mixture_inputs(shape: Mapping[str, Any], names: tuple[str, str], biases: bool) -> Inputs:
    """Return x, the low-rank pair (named `names`), its biases, and the gate."""
    generator = seeded()
    channels, experts, rank = shape["channels"], shape["experts"], shape["rank"]

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return leaf(draw(*size, generator=generator, scale=scale))

    down, up = names
    inputs = {
        "x": randn(shape["batch"], shape["length"], channels),
        f"{down}": randn(experts, rank, channels, scale=channels**-0.5),
        f"{up}": randn(experts, channels, rank, scale=rank**-0.5),
    }
    if biases:
        inputs |= {"down_bias": randn(experts, rank), "up_bias": randn(experts, channels)}
    return {**inputs, **gate_of(shape, generator)}


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


def mixture(name: str, one_by_one: Operator, products: Operator) -> Suite:
    options = {"bias": None} if name == "mixture_of_lora_linear" else {}
    reference = partial(getattr(lion_reference, name), **options)
    operators = {
        "eager": one_by_one,
        "products": products,
        "torch.compile": torch.compile(products),
        OURS: partial(getattr(lion_kernels, name), backend=BACKEND, **options),
    }
    return Suite(SUITE, operators, plain=reference, reference=reference)


def adapters(shape: dict[str, Any]) -> Case:
    def inputs() -> Inputs:
        made = mixture_inputs(shape, ("down_weight", "up_weight"), biases=True)
        return {**made, "residual": leaf(draw(*made["x"].shape, generator=seeded(1)))}

    suite = mixture("mixture_of_adapters", adapters_one_by_one, adapters_by_products)
    experts = shape.get("chosen", shape["experts"])
    costs = adapters_cost(shape["batch"] * shape["length"], shape["channels"], experts, shape["rank"], DTYPE)
    return Case(suite, inputs, costs)


def lora(shape: dict[str, Any]) -> Case:
    def inputs() -> Inputs:
        made, channels = mixture_inputs(shape, ("lora_a", "lora_b"), biases=False), shape["channels"]
        weight = leaf(draw(channels, channels, generator=seeded(1), scale=channels**-0.5))
        return {**made, "weight": weight.requires_grad_(False)}

    suite = mixture("mixture_of_lora_linear", lora_one_by_one, lora_by_products)
    channels, experts = shape["channels"], shape.get("chosen", shape["experts"])
    costs = lora_cost(shape["batch"] * shape["length"], channels, channels, experts, shape["rank"], DTYPE)
    return Case(suite, inputs, costs)


# ---------------------------------------------------------------- attention


def heads_of(shape: Mapping[str, Any], scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator, batch, heads = seeded(), shape["batch"], (shape["heads"], shape["head_dim"])
    q = draw(batch, shape["queries"], *heads, generator=generator, scale=scale)
    k, v = (draw(batch, shape["keys"], *heads, generator=generator) for _ in range(2))
    return leaf(q), leaf(k), leaf(v)


def meta_heads(shape: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    def empty(length: int) -> Tensor:
        return torch.empty(shape["batch"], length, shape["heads"], shape["head_dim"], dtype=DTYPE, device="meta")

    return empty(shape["queries"]), empty(shape["keys"])


def attention(shape: dict[str, Any]) -> Case:
    reference = gathered(lion_reference.multi_scale_attention)
    q, k = meta_heads(shape)
    operators = with_ours(ATTENTION, gathered(partial(lion_kernels.multi_scale_attention, backend=BACKEND)))
    if ON_GPU:
        operators.pop("SDPA")  # it selects one of its backends, which are all listed
    suite = Suite(SUITE, operators, reference, reference, forward_only=FLEX_FORWARD)
    return Case(suite, lambda: dict(zip(("q", "k0", "v0"), heads_of(shape), strict=True)), attention_cost(q, [k]))


def biased_attention(shape: dict[str, Any]) -> Case:
    """Return the case with a frozen table, without its gradient, as in LION's frozen language model."""
    decoder = shape["stack"] == "decoder"

    def inputs() -> Inputs:
        table = leaf(draw(BUCKETS, shape["heads"], generator=seeded(1))).requires_grad_(False)
        made = heads_of(shape, scale=shape["head_dim"] ** -0.5)
        return {**dict(zip("qkv", made, strict=True)), "bias_table": table}

    reference = partial(in_decoder(lion_reference.relative_bias_attention), decoder=decoder)
    ours = in_decoder(partial(lion_kernels.relative_bias_attention, backend=BACKEND))
    operators: dict[str, Operator] = {
        name: partial(peer, decoder=decoder) for name, peer in with_ours(BIASED_ATTENTION, ours).items()
    }
    q, k = meta_heads(shape)
    costs = biased_attention_cost(q, k, causal=decoder, learn_bias=False)
    return Case(Suite(SUITE, operators, reference, reference, forward_only=FLEX_FORWARD), inputs, costs)


# ---------------------------------------------------------------- rows


def norm(shape: dict[str, Any]) -> Case:
    reference = partial(lion_reference.rms_norm, eps=bench_rms_norm.EPS)
    ours = partial(lion_kernels.rms_norm, eps=bench_rms_norm.EPS, backend=BACKEND)
    suite = Suite(SUITE, with_ours(bench_rms_norm.PEERS, ours), bench_rms_norm.eager, reference)
    return Case(suite, partial(bench_rms_norm.make_inputs, shape), rms_norm_cost(*row_sizes(shape)))


def layer_norm(shape: dict[str, Any]) -> Case:
    """Return the case, checked without dropout and timed with it."""
    p = shape["dropout"]

    def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        summed = F.dropout(x + x_bias, p) + residual
        return F.layer_norm(summed, weight.shape, weight, bias, bench_residual_layer_norm.EPS)

    ours = partial(lion_kernels.residual_layer_norm, eps=bench_residual_layer_norm.EPS, backend=BACKEND)
    operators = with_ours(bench_residual_layer_norm.PEERS, ours)
    timed: dict[str, Operator] = {
        "eager": dropped, "torch.compile": torch.compile(dropped), OURS: partial(ours, dropout_p=p, seed=0)
    }  # fmt: skip
    suite = Suite(
        SUITE,
        {name: operators[name] for name in timed if name in operators},
        plain=bench_residual_layer_norm.eager,
        reference=partial(lion_reference.residual_layer_norm, eps=bench_residual_layer_norm.EPS),
        timed=timed,
    )
    costs = layer_norm_cost(shape["images"] * shape["tokens"], shape["channels"], DTYPE, dropout=p > 0)
    return Case(suite, partial(bench_residual_layer_norm.make_inputs, shape), costs)


def gelu(shape: dict[str, Any]) -> Case:
    peers = with_ours(bench_gated_gelu.PEERS, partial(lion_kernels.gated_gelu, backend=BACKEND))
    suite = Suite(SUITE, peers, bench_gated_gelu.eager, lion_reference.gated_gelu)
    return Case(suite, partial(bench_gated_gelu.make_inputs, shape), gelu_cost(*row_sizes(shape)))


def row_sizes(shape: Mapping[str, Any]) -> tuple[int, int, torch.dtype]:
    return shape["tokens"], shape["channels"], DTYPE


def assembled(shape: dict[str, Any]) -> Case:
    soft_prompt_id = bench_assemble_inputs.SOFT_PROMPT_ID
    reads = partial(lion_reference.assemble_inputs, soft_prompt_id=soft_prompt_id)
    ours = partial(lion_kernels.assemble_inputs, soft_prompt_id=soft_prompt_id, backend=BACKEND)
    suite = Suite(SUITE, with_ours(bench_assemble_inputs.PEERS, ours), bench_assemble_inputs.eager, reads)
    costs = assemble_cost(shape["batch"], shape["prefix"], shape["length"], shape["channels"], DTYPE)
    return Case(suite, partial(bench_assemble_inputs.make_inputs, shape), costs)


def with_ours(peers: Mapping[str, Operator], ours: Operator) -> dict[str, Operator]:
    """Return the peers of an operator's own suite, with only this suite's form of ours."""
    return {**{name: peer for name, peer in peers.items() if not name.startswith("lion")}, OURS: ours}


CASES: dict[str, Callable[[dict[str, Any]], Case]] = {
    "mixture_of_adapters": adapters,
    "mixture_of_lora_linear": lora,
    "multi_scale_attention": attention,
    "relative_bias_attention": biased_attention,
    "rms_norm": norm,
    "residual_layer_norm": layer_norm,
    "gated_gelu": gelu,
    "assemble_inputs": assembled,
}


def case_of(headline: Headline) -> Case:
    return CASES[headline.operator](sizes(headline))


def peers(headline: Headline) -> list[str]:
    names = list(case_of(headline).suite.operators)
    return [name for name in names if COMPILES or name not in ("torch.compile", "FlexAttention")]


@pytest.mark.parametrize(
    ("row", "direction", "peer"),
    [
        pytest.param(row, direction, peer, id=f"{row.operator}: {row.label}-{direction}-{peer}")
        for row in ROWS
        for direction in row.directions
        for peer in peers(row)
    ],
)
def bench(benchmark: Callable, row: Headline, direction: str, peer: str) -> None:
    if not ON_GPU and SECONDS > 0:
        pytest.skip("a GPU's shapes; on a CPU `python -m benchmarks.harness run headline --quick` runs small ones")
    if COMPILE_ONLY and direction != row.directions[0]:
        pytest.skip("both directions are compiled together")
    suite, make_inputs, costs = case_of(row)
    operators = {name: suite.operators[name] for name in peers(row)}
    # Backward is not requested unless it is measured, because a peer might lack it.
    forward_only = frozenset(operators) if row.directions == ("forward",) else suite.forward_only
    chosen = replace(suite, operators=operators, forward_only=forward_only)
    shape = {"operator": row.operator, **sizes(row)}
    measure(benchmark, chosen, peer, direction, shape, make_inputs, costs)
