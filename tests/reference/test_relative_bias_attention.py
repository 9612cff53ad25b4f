"""T5's attention against loops, and its buckets against integer arithmetic."""

import pytest
import torch
from torch import Tensor

from lion_reference import relative_bias_attention
from lion_reference.relative_bias_attention import relative_position_bucket
from tests.reference import loops
from tests.reference.loops import randn

BATCH, LENGTH, HEADS, HEAD_DIM, BUCKETS, MAX_DISTANCE = 2, 7, 2, 3, 8, 6


def bucket(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """Compute T5's bucket of one distance in integers.

    With n exact buckets of m, a distance d >= n has bucket n + j, where j is the largest j < m - n with
    (d / n)^(m - n) >= (max_distance / n)^j.
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    count = num_buckets - exact
    reached = [j for j in range(count) if distance**count * exact**j >= max_distance**j * exact**count]
    return first + exact + max(reached)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 6), (16, 100)])
def test_buckets_are_exact(num_buckets, max_distance, bidirectional):
    distances = torch.arange(-600, 601)
    buckets = relative_position_bucket(
        distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    wanted = [bucket(d, num_buckets, max_distance, bidirectional) for d in distances.tolist()]
    assert buckets.tolist() == wanted


@pytest.fixture
def arguments() -> dict:
    shape = (BATCH, LENGTH, HEADS, HEAD_DIM)
    return {"q": randn(0, *shape), "k": randn(1, *shape), "v": randn(2, *shape), "bias_table": randn(3, BUCKETS, HEADS)}


def attention(q, k, v, bias_table, bidirectional: bool, causal: bool, mask: Tensor) -> Tensor:
    offset = k.shape[1] - q.shape[1]

    def score(b: int, i: int, j: int, h: int) -> Tensor:
        return q[b, i, h] @ k[b, j, h] + bias_table[bucket(j - i - offset, BUCKETS, MAX_DISTANCE, bidirectional), h]

    return loops.attention(q, k, v, score, lambda b, i, j: bool(mask[b, j]) and not (causal and j > i + offset))


@pytest.mark.parametrize("queries", [LENGTH, 1])
@pytest.mark.parametrize(("bidirectional", "causal"), [(True, False), (False, True)])
def test_follows_the_definition(arguments, queries, bidirectional, causal):
    arguments["q"] = arguments["q"][:, LENGTH - queries :]
    mask = torch.tensor([[1] * LENGTH, [0, 1, 1, 0, 1, 0, 0]])
    out = relative_bias_attention(
        **arguments, key_padding_mask=mask, bidirectional=bidirectional, max_distance=MAX_DISTANCE, causal=causal
    )
    # With a causal mask, the second sample's first query attends to no key and gets zeros.
    torch.testing.assert_close(out, attention(**arguments, bidirectional=bidirectional, causal=causal, mask=mask))


def test_dropout_mask_multiplies_the_probabilities(arguments):
    keep = torch.zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    keep[..., 2] = 2.0
    out = relative_bias_attention(**arguments, max_distance=MAX_DISTANCE, dropout_mask=keep)
    only = arguments["v"].clone()
    only[:, [0, 1, 3, 4, 5, 6]] = 0
    everything = torch.ones(BATCH, LENGTH)
    wanted = attention(**{**arguments, "v": only}, bidirectional=True, causal=False, mask=everything)
    torch.testing.assert_close(out, 2 * wanted)
