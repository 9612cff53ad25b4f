"""Tests of `mixture_of_lora_linear` beyond `test_contract.py`: the choice of its implementation, and cost."""

import importlib

import torch

MODULE = importlib.import_module("lion_kernels.mixture_of_lora_linear")  # the function has the module's name


def test_narrow_products_are_fused_and_wide_ones_left_to_the_library() -> None:
    """Adding the update separately moves y two more times, which a long product hides."""
    assert MODULE.fuses(16384, 512, 2048, torch.bfloat16)
    assert not MODULE.fuses(16384, 4096, 4096, torch.bfloat16)
    assert not MODULE.fuses(16384, 512, 2048, torch.float32)


def test_cost() -> None:
    forward, backward = MODULE.cost(16384, 4096, 4096, 8, 16, torch.bfloat16)
    assert forward.flops == 2 * 16384 * 4096 * 4096 + 2 * 16384 * 2 * 4096 * 128
    assert forward.bytes == 2 * (2 * 16384 * 4096 + 4096 * 4096 + 2 * 4096 * 128)
    trained = MODULE.cost(16384, 4096, 4096, 8, 16, torch.bfloat16, frozen=False)[1]
    assert trained.flops - backward.flops == 2 * 16384 * 4096 * 4096
