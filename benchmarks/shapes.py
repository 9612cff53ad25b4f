"""The shapes of LION XL and XXL in training and decoding, with one dimension varied at a time.

Token counts are a decoding step, five beams, a question (64), one image's prompt (320), and batches of prompts; on a
CPU the same with fewer tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.harness.results import DIRECTIONS
from benchmarks.harness.side_by_side import INTERLEAVED, SECONDS, Operator, Shape, Suite, measure

ON_GPU = torch.cuda.is_available()
# Compiling takes ten seconds or more on a CPU, too long for a run that measures nothing.
COMPILES = ON_GPU or SECONDS > 0
COMPILED = ("torch.compile", "FlexAttention")  # peers that compile
TOKENS = (1, 5, 64, 320, 4096, 16384, 65536) if ON_GPU else (1, 5, 64, 320, 1280)
CHANNELS = (1408, 2048, 4096)
EXPERTS = (1, 2, 4, 8, 16)
RANKS = (8, 16, 64)
MANY = 16384 if ON_GPU else 320  # tokens while the other dimensions vary


def star(base: dict[str, int], axes: dict[str, Sequence[int]]) -> list[dict[str, int]]:
    """Return `base`, and its variations along one axis at a time."""
    return [base, *({**base, axis: value} for axis, values in axes.items() for value in values if value != base[axis])]


def mixtures(base: dict[str, int]) -> list[dict[str, int]]:
    """Return shapes around `base` with many tokens along every axis, and on a GPU those of decoding with five."""
    axes = {"tokens": TOKENS, "channels": CHANNELS, "experts": EXPERTS, "rank": RANKS}
    shapes = star({**base, "tokens": MANY}, axes)
    if ON_GPU:
        shapes += star({**base, "tokens": 5}, {"experts": EXPERTS, "rank": RANKS})[1:]
    return shapes


def by_backend(operator: Operator, **options: Any) -> dict[str, Operator]:
    """Return our operator as peers: in PyTorch, and with its kernels."""
    return {f"lion_kernels-{backend}": partial(operator, **options, backend=backend) for backend in ("torch", "triton")}


def label(shape: Shape) -> str:
    return "-".join(
        f"{name[0].upper()}{value}" if isinstance(value, int) else str(value) for name, value in shape.items()
    )


def sequences(shape: Shape) -> tuple[int, int]:
    """Return batch and length: given, or prompts of 320 for many tokens, and decoding steps for few."""
    if "batch" in shape:
        return shape["batch"], shape["length"]
    tokens = shape["tokens"]
    if tokens < 64:
        return tokens, 1
    length = max(size for size in (64, 256, 320) if tokens % size == 0 and size <= tokens)
    return tokens // length, length


def compare_peers(suite_at: Callable[[Shape], Suite], shapes: Sequence[Shape], base: Shape | None = None) -> Callable:
    """Return the benchmark of an operator by shape, direction and peer, with the peers of a comparison in succession.

    Because compiling takes seconds, peers that compile are left out at most shapes on a CPU. Kernels are measured on a
    GPU.

    Args:
        suite_at: returns the suite of all peers at a shape.
        base: peers that compile are measured only with these sizes and some numbers of tokens. If None, they are
            measured at the first of `shapes` on a CPU, and at all on a GPU.
    """

    def compiles(shape: Shape) -> bool:
        if base is None:
            return ON_GPU or (COMPILES and shape == shapes[0])
        sizes = (5, 320, MANY) if ON_GPU else (MANY,)
        return COMPILES and shape["tokens"] in sizes and all(shape[name] == base[name] for name in base)

    def measured(shape: Shape) -> Suite:
        suite = suite_at(shape)
        left_out = (() if compiles(shape) else COMPILED) + (() if ON_GPU else ("lion_kernels-triton",))
        return replace(suite, operators={name: op for name, op in suite.operators.items() if name not in left_out})

    @INTERLEAVED
    @pytest.mark.parametrize(
        ("shape", "direction", "peer"),
        [
            pytest.param(shape, direction, peer, id=f"{label(shape)}-{direction}-{peer}")
            for shape in shapes
            for direction in DIRECTIONS
            for peer in measured(shape).operators
        ],
    )
    def bench(benchmark: Callable, shape: Shape, direction: str, peer: str) -> None:
        measure(benchmark, measured(shape), peer, direction, shape)

    return bench
