"""The shapes that LION XL and XXL have in training and decoding, one dimension varied at a time.

Tokens: a step of decoding, five beams, 64 of a question, 320 of one picture's prompt, and batches of prompts. On a CPU
the same with fewer tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.harness.side_by_side import DIRECTIONS, SECONDS, Operator

ON_GPU = torch.cuda.is_available()
# Compiling takes ten seconds and more on a CPU, too many for a run that measures nothing.
COMPILES = ON_GPU or SECONDS > 0
TOKENS = (1, 5, 64, 320, 4096, 16384, 65536) if ON_GPU else (1, 5, 64, 320, 1280)
CHANNELS = (1408, 2048, 4096)
EXPERTS = (1, 2, 4, 8, 16)
RANKS = (8, 16, 64)
MANY = 16384 if ON_GPU else 320  # the tokens at which the other dimensions vary


def star(base: dict[str, int], axes: dict[str, Sequence[int]]) -> list[dict[str, int]]:
    """`base`, and what comes of it when one axis at a time takes its other values."""
    return [base, *({**base, axis: value} for axis, values in axes.items() for value in values if value != base[axis])]


def mixtures(base: dict[str, int]) -> list[dict[str, int]]:
    """Around `base` at many tokens by every axis, and on a GPU around five by what decoding depends on too."""
    axes = {"tokens": TOKENS, "channels": CHANNELS, "experts": EXPERTS, "rank": RANKS}
    shapes = star({**base, "tokens": MANY}, axes)
    if ON_GPU:
        shapes += star({**base, "tokens": 5}, {"experts": EXPERTS, "rank": RANKS})[1:]
    return shapes


def rows(channels: int) -> list[dict[str, int]]:
    return star({"tokens": MANY, "channels": channels}, {"tokens": TOKENS, "channels": CHANNELS})


def compiled(shape: dict[str, Any], base: dict[str, int]) -> bool:
    """Whether `torch.compile` is a peer: compiling takes seconds, so at the base's dimensions and some sizes only."""
    sizes = (5, 320, MANY) if ON_GPU else (MANY,)
    return COMPILES and shape["tokens"] in sizes and all(shape[name] == base[name] for name in base)


def by_backend(operator: Operator, **options: Any) -> dict[str, Operator]:
    """Our operator as peers: in PyTorch, and on a GPU by its kernels."""
    backends = ("torch", "triton") if ON_GPU else ("torch",)
    return {f"lion_kernels-{backend}": partial(operator, **options, backend=backend) for backend in backends}


def compiled_at_base(peers: Mapping[str, Operator], shape: dict[str, Any], base: dict[str, int]) -> dict[str, Operator]:
    """`peers`, with `torch.compile` where `compiled` says so."""
    return {name: peer for name, peer in peers.items() if name != "torch.compile" or compiled(shape, base)}


def one_compiled(peers: Mapping[str, Any], shape: dict[str, Any], shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`peers`, on a CPU those that compile at the first of `shapes` alone."""
    left_out = () if ON_GPU or (COMPILES and shape == shapes[0]) else ("torch.compile", "FlexAttention")
    return {name: peer for name, peer in peers.items() if name not in left_out}


def label(shape: dict[str, Any]) -> str:
    return "-".join(
        f"{name[0].upper()}{value}" if isinstance(value, int) else str(value) for name, value in shape.items()
    )


def sequences(tokens: int) -> tuple[int, int]:
    """Batch and length: prompts of 320 where there are many tokens, decoding steps where there are few."""
    if tokens < 64:
        return tokens, 1
    length = max(size for size in (64, 256, 320) if tokens % size == 0 and size <= tokens)
    return tokens // length, length


def cases(
    shapes: Sequence[dict[str, Any]], peers: Callable[[dict[str, Any]], Iterable[str]]
) -> Callable[[Callable], Callable]:
    """Parametrizes a benchmark by shape, direction and peer, those of one comparison one after the other."""
    return pytest.mark.parametrize(
        ("shape", "direction", "peer"),
        [
            pytest.param(shape, direction, peer, id=f"{label(shape)}-{direction}-{peer}")
            for shape in shapes
            for direction in DIRECTIONS
            for peer in peers(shape)
        ],
    )
