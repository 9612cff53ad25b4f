"""What the operators have in common that take x row by row: [..., D], each row by itself.

Their kernels see x as [rows, D] with a stride between the rows. A tile is BT rows of BD >= D channels. Where a sum runs
over rows, each program keeps a partial sum of its own, and the programs' are added up afterwards, in a fixed order.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from lion_kernels.core.backend import DTYPES, triton
from lion_kernels.core.specs import KernelSpec
from lion_kernels.core.tuned_sizes import lookup, shipped

WIDTHS = (64, 768, 1408, 2048, 4096, 8192)  # of the ahead-of-time report
_TILES_PER_PROGRAM = 4  # at least, where each program writes a partial sum of its own


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D], its last dimension contiguous; copied only where no view of it is that."""
    return last_contiguous(x.reshape(-1, x.shape[-1]))


def why_unsupported(tensors: dict[str, Tensor | None], max_channels: int | None = None) -> str | None:
    """Why the kernels do not take a call; None where they do.

    Args:
        tensors: the floating arguments by name; the first has the channels.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name}: expected float16, bfloat16 or float32 for backend 'triton', got {tensor.dtype}"
    name, x = next(iter(tensors.items()))
    assert x is not None
    if max_channels is not None and not 0 < x.shape[-1] <= max_channels:
        return f"{name}: expected D from 1 to {max_channels} for backend 'triton', got {x.shape[-1]}"
    return None


def row_tile(operator: str, channels: int) -> dict[str, int]:
    """What a launch is sized by: BT rows and BD >= D channels of a tile, 16 values of it a thread, and the warps."""
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, 2048 // block)
    tile = lookup(operator, f"D{block}", {"BT": rows, "BD": block, "num_warps": rows * block // 512})
    return {"D": channels, **tile}


def partial_sums(tiles: int, num_warps: int, device: torch.device, *, resident_warps: int) -> int:
    """How many programs share `tiles` where each keeps a partial sum: they all run at once, and are few enough that
    adding up what they write costs little.

    Args:
        num_warps: of a program.
        resident_warps: that a multiprocessor's registers have room for.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    resident = processors * max(1, resident_warps // num_warps)
    return max(1, min(triton.cdiv(tiles, _TILES_PER_PROGRAM), resident))


def row_spec(
    name: str, kernel: Any, dtype: str, kinds: dict[str, str], constexprs: dict[str, Any], num_warps: int
) -> KernelSpec:
    """`kernel` for rows whose length is a multiple of 16.

    Args:
        dtype: of the values that pointers left out of `kinds` point at.
        kinds: types of the arguments, but for the strides, which are i64.
    """
    names = [argument for argument in kernel.arg_names if argument not in constexprs]
    strides = tuple(argument for argument in names if argument.startswith("stride_"))
    lengths = tuple(argument for argument in names if argument == "D")
    return KernelSpec(
        name=f"{kernel.__name__.removesuffix('_kernel')} {dtype} {name} warps={num_warps}",
        kernel=kernel,
        signature=dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(strides, "i64") | kinds,
        constexprs={argument: value for argument, value in constexprs.items() if argument in kernel.arg_names},
        num_warps=num_warps,
        num_stages=3,
        matrix=False,
        divisible=strides + lengths,
    )


def norm_specs(
    kernel: Any, widths: tuple[int, ...], kinds: dict[str, str], variants: dict[str, tuple[str, ...]]
) -> list[KernelSpec]:
    """`kernel` at these widths, in bf16 and fp32, with every tile it may be launched with.

    Args:
        kernel: its name less "_kernel" is what `row_tile` knows it by.
        widths: values of D.
        kinds: as for `row_spec`.
        variants: name -> pointers that are None in it.
    """
    operator = kernel.__name__.removesuffix("_kernel")
    specs = []
    for channels, dtype in itertools.product(widths, ("bf16", "fp32")):
        default = row_tile(operator, channels)
        tiles = [default, *(tile for tile in shipped(operator) if tile["BD"] == default["BD"])]
        for tile, (variant, absent) in itertools.product(tiles, variants.items()):
            constexprs = {"D": channels, "BT": tile["BT"], "BD": tile["BD"], **dict.fromkeys(absent)}
            name = f"{variant} D={channels} BT={tile['BT']}"
            specs.append(row_spec(name, kernel, dtype, kinds, constexprs, tile["num_warps"]))
    return specs
