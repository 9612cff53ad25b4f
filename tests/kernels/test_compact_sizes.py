"""The launch sizes for GPUs with little shared memory, which no other test uses, give the same results."""

import pytest
import torch

from lion_fast.check.cases import Case
from lion_fast.check.compare import compare
from lion_kernels.core import tuned_sizes
from lion_kernels.core.backend import interpreting
from tests.kernels.contract import ATTENTION, CASES, LOW_RANK, SMALL, name_of

# Head dimensions in one piece and in two, a padding mask, a gate, dropout, and every form of the adapters' gate.
COMPACT = [
    case
    for case in (*SMALL, *CASES)
    if case.operator in (*ATTENTION, *LOW_RANK)
    if case in SMALL or ("of 88" in case.label and "257" not in case.label)
]


@pytest.mark.skipif(not interpreting(), reason="a GPU's own sizes are what its tests launch")
@pytest.mark.parametrize("case", COMPACT, ids=name_of)
def test_compact_sizes_compute_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_sizes, "is_compact", lambda device: True)
    outcome = compare(case, torch.float16, torch.device("cpu"), repeats=1)
    assert outcome.kernels
    assert not outcome.problems
