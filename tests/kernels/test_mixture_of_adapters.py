"""Tests of `mixture_of_adapters` beyond `test_contract.py`: independent tasks, an exact residual stream, and cost."""

import importlib

import pytest
import torch

from lion_fast.check import cases
from lion_kernels import mixture_of_adapters
from lion_kernels.core.cost import H200, floor_seconds
from tests.kernels.contract import make

MODULE = importlib.import_module("lion_kernels.mixture_of_adapters")  # the function has the module's name
CASE = cases.adapters("channel", (3, 5), 32, 2, 8)


def test_a_batch_of_mixed_tasks_is_its_sequences() -> None:
    inputs = make(CASE, torch.float64)
    together = mixture_of_adapters(**inputs)
    for sequence in range(3):
        one = {name: inputs[name][sequence : sequence + 1] for name in ("x", "residual", "task_ids")}
        torch.testing.assert_close(mixture_of_adapters(**{**inputs, **one})[0], together[sequence])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_rounds_nothing_but_the_update(backend: str, device: torch.device) -> None:
    inputs = make(CASE, device=device)
    inputs["gate"] = torch.zeros_like(inputs["gate"])
    with torch.autocast(device.type, dtype=torch.float16), torch.no_grad():
        out = mixture_of_adapters(**inputs, backend=backend)
    assert torch.equal(out, inputs["residual"])


def test_cost_is_the_floor_of_the_published_sizes() -> None:
    """On an H200, 16384 tokens of LION-FlanT5-XL take at least 47 us, and as long backward, for the rows alone."""
    forward, backward = MODULE.cost(16384, 2048, 2, 64, torch.bfloat16)
    assert floor_seconds(forward, H200, torch.bfloat16) == pytest.approx(47e-6, rel=0.02)
    assert floor_seconds(backward, H200, torch.bfloat16) == pytest.approx(47e-6, rel=0.05)
    assert forward.flops / H200.flops_per_second["bfloat16"] == pytest.approx(22e-6, rel=0.02)
    assert backward.flops / H200.flops_per_second["bfloat16"] == pytest.approx(44e-6, rel=0.02)
