"""RMS norm against a loop over rows."""

import math

import torch

from lion_reference import rms_norm


def test_follows_the_definition():
    torch.manual_seed(0)
    x, weight, eps = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64), 0.1
    out = rms_norm(x, weight, eps)
    for row, normed in zip(x.tolist(), out, strict=True):
        root = math.sqrt(sum(value**2 for value in row) / 5 + eps)
        wanted = [value / root * w for value, w in zip(row, weight.tolist(), strict=True)]
        torch.testing.assert_close(normed, torch.tensor(wanted, dtype=torch.float64))
