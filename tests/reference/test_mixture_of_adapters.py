"""The mixture of adapters against loops over rows and experts, in fp64."""

import pytest
import torch
from torch import Tensor

from lion_reference import MixtureOfAdapters, mixture_of_adapters
from tests.reference.loops import randn

BATCH, LENGTH, WIDTH, EXPERTS, RANK, TASKS = 3, 4, 6, 3, 2, 2


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {
        "down_weight": randn(3, EXPERTS, RANK, WIDTH),
        "down_bias": randn(4, EXPERTS, RANK),
        "up_weight": randn(5, EXPERTS, WIDTH, RANK),
        "up_bias": randn(6, EXPERTS, WIDTH),
    }


@pytest.fixture
def x() -> Tensor:
    return randn(1, BATCH, LENGTH, WIDTH)


def expert(row: Tensor, weights: dict[str, Tensor], e: int, activation: str = "relu") -> Tensor:
    """Compute expert e's output for one row [D], one number at a time."""
    hidden = []
    for r in range(RANK):
        value = weights["down_bias"][e, r] + sum(weights["down_weight"][e, r, d] * row[d] for d in range(WIDTH))
        hidden.append(max(value, torch.zeros(())) if activation == "relu" else value)
    return torch.stack(
        [
            weights["up_bias"][e, d] + sum(weights["up_weight"][e, d, r] * hidden[r] for r in range(RANK))
            for d in range(WIDTH)
        ]
    )


def mixture(x: Tensor, weights: dict[str, Tensor], factor, activation: str = "relu") -> Tensor:
    """Compute the mixture, where factor(b, n, e) is the weight of expert e for row (b, n)."""
    out = torch.zeros_like(x)
    for b in range(BATCH):
        for n in range(LENGTH):
            for e in range(EXPERTS):
                out[b, n] += factor(b, n, e) * expert(x[b, n], weights, e, activation)
    return out


TASK_GATE, TASK_IDS = randn(2, TASKS, EXPERTS, WIDTH), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 1]])
DENSE_GATE = randn(2, BATCH, LENGTH, EXPERTS)


@pytest.mark.parametrize(
    ("gate", "factor"),
    [
        ({"gate": TASK_GATE, "task_ids": TASK_IDS[:, 0]}, lambda b, _, e: TASK_GATE[TASK_IDS[b, 0], e]),
        ({"gate": TASK_GATE, "task_ids": TASK_IDS}, lambda b, n, e: TASK_GATE[TASK_IDS[b, n], e]),
        ({"gate": DENSE_GATE}, lambda b, n, e: DENSE_GATE[b, n, e]),
        ({"gate": DENSE_GATE[:, 0]}, lambda b, _, e: DENSE_GATE[b, 0, e]),
        ({"gate": DENSE_GATE[:, :1]}, lambda b, _, e: DENSE_GATE[b, 0, e]),
    ],
    ids=["tasks of sequences", "tasks of rows", "rows", "sequences", "sequences, broadcast"],
)
def test_every_gate_follows_the_definition(x, weights, gate, factor):
    torch.testing.assert_close(mixture_of_adapters(x, **weights, **gate), mixture(x, weights, factor))


def test_sparse_gate(x, weights):
    gate, generator = randn(2, BATCH, LENGTH, 2), torch.Generator().manual_seed(0)
    expert_ids = torch.randint(-1, EXPERTS, (BATCH, LENGTH, 2), generator=generator)
    expert_ids[0, 0] = -1  # a row without any expert
    expert_ids[0, 1] = 2  # a row with the same expert twice
    out = mixture_of_adapters(x, **weights, gate=gate, expert_ids=expert_ids)

    def factor(b: int, n: int, e: int) -> float:
        return sum(g.item() for g, chosen in zip(gate[b, n], expert_ids[b, n], strict=True) if chosen == e)

    torch.testing.assert_close(out, mixture(x, weights, factor))
    assert (out[0, 0] == 0).all()


def test_identity_activation_without_biases_with_residual(x, weights):
    gate, residual = randn(2, EXPERTS), randn(2, BATCH, LENGTH, WIDTH)
    out = mixture_of_adapters(
        x,
        weights["down_weight"],
        None,
        weights["up_weight"],
        None,
        gate,
        residual=residual,
        activation="identity",
    )
    unbiased = weights | {name: torch.zeros_like(weights[name]) for name in ("down_bias", "up_bias")}
    torch.testing.assert_close(out, residual + mixture(x, unbiased, lambda _b, _n, e: gate[e], "identity"))


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 1, 3, 2)])
def test_any_number_of_leading_dimensions(weights, leading):
    x, gate = randn(2, *leading, WIDTH), randn(2, *leading, EXPERTS)
    out = mixture_of_adapters(x, **weights, gate=gate)
    assert out.shape == x.shape
    flat = mixture_of_adapters(x.reshape(-1, WIDTH), **weights, gate=gate.reshape(-1, EXPERTS))
    torch.testing.assert_close(out, flat.reshape(x.shape))


def test_new_module_adds_nothing(x):
    module = MixtureOfAdapters(WIDTH, RANK, num_adapters=2).double()
    assert not module(x, torch.tensor([0, 1, 1])).any()


@pytest.mark.parametrize("num_adapters", [1, 2])
def test_module_equals_the_operator_with_scaled_ratios_as_gate(x, num_adapters):
    module = MixtureOfAdapters(WIDTH, RANK, num_adapters).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    task_ids = torch.tensor([0, 1, 1])

    def stacked(name: str) -> Tensor:
        return torch.stack([adapter.get_parameter(name) for adapter in module.adapters])

    ratios = torch.ones(2, 1, WIDTH, dtype=torch.float64)
    if num_adapters == 2:
        ratios = torch.stack([module.router_ratio1, module.router_ratio2], dim=1)
    weights = [stacked(f"{half}_proj.{kind}") for half in ("down", "up") for kind in ("weight", "bias")]
    wanted = mixture_of_adapters(x, *weights, gate=ratios * stacked("scale"), task_ids=task_ids)
    torch.testing.assert_close(module(x, task_ids), wanted)


def test_module_requires_tasks(x):
    with pytest.raises(ValueError, match="task_ids: expected one id per sequence"):
        MixtureOfAdapters(WIDTH, RANK, num_adapters=2).double()(x, None)
