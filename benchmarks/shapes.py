"""The shapes of LION XL and XXL in training and decoding, with one dimension varied at a time.

Token counts are a decoding step, five beams, a question (64), one image's prompt (320), and batches of prompts; on a
CPU the same with fewer tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.harness.side_by_side import DIRECTIONS, SECONDS, Operator

ON_GPU = torch.cuda.is_available()
# Compiling takes ten seconds or more on a CPU, too long for a run that measures nothing.
COMPILES = ON_GPU or SECONDS > 0
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


def rows(channels: int) -> list[dict[str, int]]:
    return star({"tokens": MANY, "channels": channels}, {"tokens": TOKENS, "channels": CHANNELS})


def compiled(shape: dict[str, Any], base: dict[str, int]) -> bool:
    """Return whether `torch.compile` is a peer: because compiling takes seconds, only for the base and some sizes."""
    sizes = (5, 320, MANY) if ON_GPU else (MANY,)
    return COMPILES and shape["tokens"] in sizes and all(shape[name] == base[name] for name in base)


def by_backend(operator: Operator, **options: Any) -> dict[str, Operator]:
    """Return our operator as peers: in PyTorch, and on a GPU with its kernels."""
    backends = ("torch", "triton") if ON_GPU else ("torch",)
    return {f"lion_kernels-{backend}": partial(operator, **options, backend=backend) for backend in backends}


def compiled_at_base(peers: Mapping[str, Operator], shape: dict[str, Any], base: dict[str, int]) -> dict[str, Operator]:
    """Return `peers`, with `torch.compile` if `compiled` is true."""
    return {name: peer for name, peer in peers.items() if name != "torch.compile" or compiled(shape, base)}


def one_compiled(peers: Mapping[str, Any], shape: dict[str, Any], shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return `peers`; on a CPU, those that compile only at the first of `shapes`."""
    left_out = () if ON_GPU or (COMPILES and shape == shapes[0]) else ("torch.compile", "FlexAttention")
    return {name: peer for name, peer in peers.items() if name not in left_out}


def label(shape: dict[str, Any]) -> str:
    return "-".join(
        f"{name[0].upper()}{value}" if isinstance(value, int) else str(value) for name, value in shape.items()
    )


def sequences(tokens: int) -> tuple[int, int]:
    """Return batch and length: prompts of 320 for many tokens, decoding steps for few."""
    if tokens < 64:
        return tokens, 1
    length = max(size for size in (64, 256, 320) if tokens % size == 0 and size <= tokens)
    return tokens // length, length


def cases(
    shapes: Sequence[dict[str, Any]], peers: Callable[[dict[str, Any]], Iterable[str]]
) -> Callable[[Callable], Callable]:
    """Parametrize a benchmark by shape, direction and peer, with the peers of a comparison in succession."""
    return pytest.mark.parametrize(
        ("shape", "direction", "peer"),
        [
            pytest.param(shape, direction, peer, id=f"{label(shape)}-{direction}-{peer}")
            for shape in shapes
            for direction in DIRECTIONS
            for peer in peers(shape)
        ],
    )
