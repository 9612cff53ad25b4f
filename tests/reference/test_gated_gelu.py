"""The gated GELU against the standard library's normal distribution function."""

from statistics import NormalDist

import torch

from lion_reference import gated_gelu


def test_is_the_exact_gelu():
    gate = torch.linspace(-5, 5, 41, dtype=torch.float64)
    up = torch.linspace(2, -1, 41, dtype=torch.float64)
    wanted = [g * NormalDist().cdf(g) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    torch.testing.assert_close(gated_gelu(gate, up), torch.tensor(wanted, dtype=torch.float64))
