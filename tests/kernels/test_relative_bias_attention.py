"""Tests of `relative_bias_attention` beyond `test_contract.py`: buckets, masks, decoding steps and cost."""

import pytest
import torch

from lion_fast.check import cases
from lion_kernels.attention.bias import bucket_by_distance
from lion_kernels.relative_bias_attention import cost, relative_bias_attention
from lion_reference.relative_bias_attention import relative_position_bucket as reference_bucket
from tests.kernels.contract import make
from tests.rounding import OPERATOR_FP32, relative_error


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 127), (64, 1000), (10, 9), (4, 2), (33, 50)])
def test_buckets_are_the_reference_s(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    """Compare at every distance; beyond max_distance, the bucket is that of max_distance."""
    distance = torch.arange(-10 * max_distance, 10 * max_distance + 1)
    expected = reference_bucket(
        distance, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    table = bucket_by_distance(num_buckets, max_distance, bidirectional, torch.device("cpu"))
    assert table.shape == (2 * max_distance + 1,)
    assert torch.equal(table[distance.clamp(-max_distance, max_distance) + max_distance], expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_query_that_attends_nothing_gives_zeros(backend: str, device: torch.device) -> None:
    """In the first element these are all queries, in the second those before the first key without padding."""
    case = cases.biased_attention(9, 9, 16, mask=True, decoder=True)
    tensors = make(case, device=device)
    tensors["key_padding_mask"][1] = torch.arange(9) >= 4
    out = relative_bias_attention(**case.arguments(tensors), backend=backend)
    assert (out[0] == 0).all()
    assert (out[1, :4] == 0).all()
    assert (out[1, 4:] != 0).all()
    leaves = [value for value in tensors.values() if value.requires_grad]
    for gradient in torch.autograd.grad(out.square().sum() + out.sum(), leaves):
        assert gradient.isfinite().all()


def test_the_cache_s_steps_are_the_sequence(device: torch.device) -> None:
    case = cases.biased_attention(65, 65, 24, heads=1, decoder=True)
    with torch.no_grad():
        given = case.arguments(make(case, device=device))
        whole = relative_bias_attention(**given, backend="triton")
        for position in (0, 1, 50, 64):
            step = {name: given[name][:, : position + 1] for name in "kv"} | {"q": given["q"][:, [position]]}
            out = relative_bias_attention(**given | step, backend="triton")
            assert relative_error(out, whole[:, [position]]) < OPERATOR_FP32


def test_cost_counts_what_is_attended() -> None:
    q = torch.empty(2, 10, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 30, 4, 64, dtype=torch.bfloat16, device="meta")
    forward, _ = cost(q, k)
    assert forward.flops == 4 * 2 * 4 * 10 * 30 * 64
    assert forward.bytes == 2 * (q.numel() + k.numel()) * 2
    causal, _ = cost(q, k, causal=True)
    assert causal.flops == 4 * 2 * 4 * sum(range(21, 31)) * 64
