"""The launch sizes of the attention kernels: pieces of a head dimension, tiles, warps and stages."""

import torch
from torch import Tensor

from lion_kernels.core import tuned_sizes
from lion_kernels.core.backend import triton
from lion_kernels.core.tuned_sizes import lookup

NARROW = 16  # minimum rows and columns of a matrix product


def split_head_dim(head_dim: int, kernel: str = "forward") -> tuple[int, int]:
    """Split `head_dim` into at most two powers of two >= 16 with the least sum that holds it; one if that is no larger.

    88 -> (64, 32), 64 -> (64, 0), 40 -> (32, 16), 128 -> (128, 0). In "backward_keys", 80 -> (64, 32) as well: pieces
    of 64 and 16 spill registers on sm_90 there, with any tile.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    if head_dim <= first or first < 16:
        return whole, 0
    least = 32 if kernel == "backward_keys" and first == 64 else 16
    second = max(least, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def tail(length: int, tile: int) -> int:
    """Return the width of the last tile of `length` in tiles of `tile`: `NARROW` if sufficient, 0 if there is none."""
    last = (length - 1) % tile + 1
    return 0 if length == 0 else NARROW if last <= NARROW else tile


def tile_sizes(kernel: str, q: Tensor, length: int, *, bias: bool, dropout: bool) -> dict[str, int]:
    """Return the tiles, warps and stages of a kernel ("forward", "backward_queries" or "backward_keys").

    Args:
        length: number of rows that the programs share: queries, or keys in "backward_keys".
    """
    width = sum(split_head_dim(q.shape[-1], kernel))
    rows = "few" if length <= 16 else "some" if length <= 64 else "many"
    features = f"{' bias' if bias else ''}{' dropout' if dropout else ''}"
    shape_class = f"{kernel} {8 * q.dtype.itemsize}-bit width={width} {rows}{features}"
    default = default_sizes(
        kernel, q.dtype, width, rows, bias=bias, dropout=dropout, compact=tuned_sizes.is_compact(q.device)
    )
    return lookup("attention", shape_class, default)


def default_sizes(
    kernel: str, dtype: torch.dtype, width: int, rows: str, *, bias: bool, dropout: bool, compact: bool
) -> dict[str, int]:
    """Return sizes for a GPU without measurements: the largest tiles that stay in registers on sm_90.

    A gathered bias and dropout's generator need registers too. `compact` sizes fit 64 KiB of shared memory.
    """
    # A third stage frees registers that two stages keep occupied.
    stages = 1 if compact else 3 if kernel == "backward_keys" and bias and dropout and width > 64 else 2
    wide = 8 if width > 64 else 4
    if dtype == torch.float32:
        tile = (32, 16, 8) if kernel == "backward_keys" else (16, 16 if compact else 32, 8)
    elif kernel == "backward_keys":
        tile = _compact_key_tile(width, bias, dropout) if compact else _key_tile(width, rows, bias, dropout)
    elif rows == "few":
        tile = (16, 32 if compact or width > 96 else 64, 4)
    elif compact:
        tile = (32 if width > 96 and kernel == "backward_queries" else 64, 32, wide)
    elif rows == "some" and bias and width > 96:
        tile = (64, 16 if dropout and kernel == "backward_queries" else 32, 4)
    elif rows == "some":
        tile = (64, 32 if dropout else 64, 8 if kernel == "backward_queries" or dropout else 4)
    else:
        narrow = width > 96 and ((dropout and bias) or (kernel == "backward_queries" and (dropout or bias)))
        tile = (128, 32 if narrow else 64, 8)
    return {"BM": tile[0], "BN": tile[1], "num_warps": tile[2], "num_stages": stages}


def _compact_key_tile(width: int, bias: bool, dropout: bool) -> tuple[int, int, int]:
    """Return queries, keys and warps of "backward_keys" for 16-bit values and 64 KiB of shared memory."""
    if width > 96:
        return (16 if bias or dropout else 32), 32, 8
    if dropout and bias:
        return 16, 64, 8
    return 32, 64, 8 if width > 64 else 4


def _key_tile(width: int, rows: str, bias: bool, dropout: bool) -> tuple[int, int, int]:
    """Return queries, keys and warps of "backward_keys" for 16-bit values; the kernel has two accumulators."""
    if rows == "few":
        return 64, 16, 4
    if bias:
        # One warp group multiplies 64 keys. With a single group, T5's head dimension of 64 leaves room for three
        # programs; other widths, and dropout's generator, spill.
        return (32 if width <= 64 else 16), 64, 4 if width == 64 and not dropout else 8
    keys = 128 if rows == "many" and width <= 96 else 64
    return (32 if dropout else 64), keys, 8


def bias_gradient_sizes(dtype: torch.dtype, width: int, *, dropout: bool, compact: bool) -> dict[str, int]:
    """Return the largest tiles that stay in registers on sm_90; `compact` sizes fit 64 KiB of shared memory."""
    if dtype == torch.float32:
        # Three stages as above: with two, Triton 3.6 targets 128 registers and spills.
        stages = 1 if compact else 3 if dropout and width > 64 else 2
        return {"BLOCK": 16 if compact else 32, "num_warps": 8, "num_stages": stages}
    return {"BLOCK": 32 if compact or (dropout and width > 64) else 64, "num_warps": 8, "num_stages": 1}
