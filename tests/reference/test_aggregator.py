"""The aggregator's initialisation."""

import torch

from lion_reference import AggregatorConfig
from lion_reference.aggregator import Aggregator


def test_new_aggregator_normalises_its_first_input():
    torch.manual_seed(0)
    aggregator = Aggregator(AggregatorConfig(num_heads=2, mlp_width=12), width=8).double().eval()
    x, first, second = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    out = aggregator(x, [first, second])
    # Repeated norms equal one norm up to eps.
    normed = (x - x.mean(-1, keepdim=True)) / x.var(-1, unbiased=False, keepdim=True).sqrt()
    torch.testing.assert_close(out, normed)
