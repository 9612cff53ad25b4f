"""The sizes that the attention kernels are launched with: pieces of a head dimension, tiles, warps and stages."""

import torch
from torch import Tensor

from lion_kernels.core import tuned_sizes
from lion_kernels.core.backend import triton
from lion_kernels.core.tuned_sizes import lookup

NARROW = 16  # the least rows or columns that a matrix product takes


def split_head_dim(head_dim: int, kernel: str = "forward") -> tuple[int, int]:
    """At most two powers of two, none under 16, of the least sum that holds `head_dim`; one where it is no more.

    88 -> (64, 32), 64 -> (64, 0), 40 -> (32, 16), 128 -> (128, 0). In "backward_keys" 80 is (64, 32) too: there a piece
    of 16 beside one of 64 spills registers on sm_90, whatever the tile.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    if head_dim <= first or first < 16:
        return whole, 0
    least = 32 if kernel == "backward_keys" and first == 64 else 16
    second = max(least, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def tail(length: int, tile: int) -> int:
    """The width of the last tile of `length` in tiles of `tile`: `NARROW` if that is enough, 0 if there is none."""
    last = (length - 1) % tile + 1
    return 0 if length == 0 else NARROW if last <= NARROW else tile


def tile_sizes(kernel: str, q: Tensor, length: int, *, bias: bool, dropout: bool) -> dict[str, int]:
    """The tiles, warps and stages of a kernel ("forward", "backward_queries" or "backward_keys").

    Args:
        length: the queries, or in "backward_keys" the keys: what the programs share out.
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
    """Sizes for a GPU that nobody measured: the largest tiles that stay in registers on sm_90.

    A gathered bias and dropout's generator want registers of their own. `compact` ones fit 64 KiB of shared memory.
    """
    # A third stage frees the registers of what the second holds back.
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
    """Queries, keys and warps of "backward_keys" in 16 bits and 64 KiB."""
    if width > 96:
        return (16 if bias or dropout else 32), 32, 8
    if dropout and bias:
        return 16, 64, 8
    return 32, 64, 8 if width > 64 else 4


def _key_tile(width: int, rows: str, bias: bool, dropout: bool) -> tuple[int, int, int]:
    """Queries, keys and warps of "backward_keys" in 16 bits, whose accumulators are two."""
    if rows == "few":
        return 64, 16, 4
    if bias:
        # 64 keys are what one warp group multiplies. In one, T5's head of 64 leaves room for three programs; other
        # widths, and dropout's generator, spill there.
        return (32 if width <= 64 else 16), 64, 4 if width == 64 and not dropout else 8
    keys = 128 if rows == "many" and width <= 96 else 64
    return (32 if dropout else 64), keys, 8


def bias_gradient_sizes(dtype: torch.dtype, width: int, *, dropout: bool, compact: bool) -> dict[str, int]:
    """The largest tiles that stay in registers on sm_90; `compact` ones fit 64 KiB of shared memory."""
    if dtype == torch.float32:
        # As above, the third stage: with two, Triton 3.6 aims at 128 registers, and spills to meet them.
        stages = 1 if compact else 3 if dropout and width > 64 else 2
        return {"BLOCK": 16 if compact else 32, "num_warps": 8, "num_stages": stages}
    return {"BLOCK": 32 if compact or (dropout and width > 64) else 64, "num_warps": 8, "num_stages": 1}
