"""Bias, dropout, residual and norm against a loop over rows."""

import math

import pytest
import torch

from lion_reference import residual_layer_norm


def test_follows_the_definition():
    torch.manual_seed(0)
    x, residual, keep = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    weight, bias, x_bias = torch.randn(3, 5, dtype=torch.float64)
    eps = 0.1
    out = residual_layer_norm(x, residual, weight, bias, eps, x_bias=x_bias, dropout_mask=keep)
    for i in range(2):
        for j in range(4):
            row = [((x[i, j, d] + x_bias[d]) * keep[i, j, d] + residual[i, j, d]).item() for d in range(5)]
            mean = sum(row) / 5
            deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / 5 + eps)
            wanted = [(row[d] - mean) / deviation * weight[d].item() + bias[d].item() for d in range(5)]
            torch.testing.assert_close(out[i, j], torch.tensor(wanted, dtype=torch.float64))


def test_error_names_the_residual():
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"residual: expected \[2, 5\] \(from x\), got \[5\]"):
        residual_layer_norm(x, torch.zeros(5), torch.ones(5), torch.zeros(5), 1e-5)
