"""The mixture of LoRA updates against the merged weight of every row, in fp64."""

import pytest
import torch
from torch import Tensor

from lion_reference import mixture_of_lora_linear
from tests.reference.loops import randn

BATCH, LENGTH, WIDTH_IN, WIDTH_OUT, EXPERTS, RANK, SCALING = 2, 3, 5, 4, 3, 2, 0.5


@pytest.fixture
def arguments() -> dict:
    return {
        "x": randn(0, BATCH, LENGTH, WIDTH_IN),
        "weight": randn(1, WIDTH_OUT, WIDTH_IN),
        "bias": randn(2, WIDTH_OUT),
        "lora_a": randn(3, EXPERTS, RANK, WIDTH_IN),
        "lora_b": randn(4, EXPERTS, WIDTH_OUT, RANK),
        "scaling": SCALING,
    }


def merged(arguments: dict, factor) -> Tensor:
    """Multiply each row by weight + scaling * sum_e diag(factor(b, n, e)) B_e A_e."""
    out = torch.empty(BATCH, LENGTH, WIDTH_OUT, dtype=torch.float64)
    for b in range(BATCH):
        for n in range(LENGTH):
            weight = arguments["weight"].clone()
            for e in range(EXPERTS):
                update = arguments["lora_b"][e] @ arguments["lora_a"][e]
                weight += SCALING * (factor(b, n, e).expand(WIDTH_OUT)[:, None] * update)
            out[b, n] = weight @ arguments["x"][b, n] + arguments["bias"]
    return out


GATE, TASK_IDS, EXPERT_IDS = (
    randn(5, BATCH, LENGTH, EXPERTS),
    torch.tensor([1, 0]),
    torch.tensor([[0, 2, -1], [1, 1, 0]]),
)
TASK_GATE = randn(5, 2, EXPERTS, WIDTH_OUT)


@pytest.mark.parametrize(
    ("gate", "factor"),
    [
        ({"gate": TASK_GATE, "task_ids": TASK_IDS}, lambda b, _, e: TASK_GATE[TASK_IDS[b], e]),
        ({"gate": GATE}, lambda b, n, e: GATE[b, n, e]),
        (
            {"gate": GATE[..., :1], "expert_ids": EXPERT_IDS[..., None]},
            lambda b, n, e: GATE[b, n, 0] * (EXPERT_IDS[b, n] == e),
        ),
    ],
    ids=["channel", "dense", "sparse"],
)
def test_every_gate_follows_the_merged_weights(arguments, gate, factor):
    torch.testing.assert_close(mixture_of_lora_linear(**arguments, **gate), merged(arguments, factor))
