"""The sizes for GPUs with little shared memory, which no other test launches, compute the same."""

import pytest
import torch

from lion_fast.check.cases import CASES, Case
from lion_fast.check.compare import compare
from lion_kernels.core import tuned_sizes
from lion_kernels.core.backend import interpreting

SIZED_BY_GPU = {"multi_scale_attention", "relative_bias_attention", "mixture_of_adapters", "mixture_of_lora_linear"}
# Head dimensions in one piece and in two, a padding mask, a gate, dropout, and every form of gate of the adapters.
COMPACT = [case for case in CASES if case.operator in SIZED_BY_GPU and "257" not in case.label]


@pytest.mark.skipif(not interpreting(), reason="a GPU's own sizes are what its tests launch")
@pytest.mark.parametrize("case", COMPACT, ids=lambda case: f"{case.operator}: {case.label}")
def test_compact_sizes_compute_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_sizes, "is_compact", lambda device: True)
    outcome = compare(case, torch.float16, torch.device("cpu"), repeats=1)
    assert outcome.kernels
    assert not outcome.problems
