"""What row-wise operators share; they process each row of [..., D] independently.

Their kernels see x as [rows, D] with a stride between rows. A tile is BT rows of BD >= D channels. For a sum over rows,
each program keeps a partial sum, and the partial sums are added afterwards in a fixed order.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from lion_kernels.core.backend import DTYPES, triton
from lion_kernels.core.specs import KernelSpec
from lion_kernels.core.tuned_sizes import lookup, shipped

WIDTHS = (64, 768, 1408, 2048, 4096, 8192)  # in the ahead-of-time report
_TILES_PER_PROGRAM = 4  # the minimum if each program writes a partial sum


def last_contiguous(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """Return x [..., D] as [rows, D] with a contiguous last dimension; copied only if no view suffices."""
    return last_contiguous(x.reshape(-1, x.shape[-1]))


def why_unsupported(tensors: dict[str, Tensor | None], max_channels: int | None = None) -> str | None:
    """Return why the kernels do not support a call, or None if they do.

    Args:
        tensors: the floating arguments by name; the last dimension of the first is the number of channels.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name}: expected float16, bfloat16 or float32 for backend 'triton', got {tensor.dtype}"
    if max_channels is not None:
        name, x = next(iter(tensors.items()))
        assert x is not None
        if x.shape[-1] > max_channels:
            return f"{name}: expected D from 1 to {max_channels} for backend 'triton', got {x.shape[-1]}"
    return None


def row_tile(operator: str, channels: int) -> dict[str, int]:
    """Return the tile, BT rows and BD >= D channels with 16 values per thread, and the number of warps."""
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, 2048 // block)
    tile = lookup(operator, f"D{block}", {"BT": rows, "BD": block, "num_warps": rows * block // 512})
    return {"D": channels, **tile}


def partial_sums(tiles: int, num_warps: int, device: torch.device, *, resident_warps: int) -> int:
    """Return the number of programs that share `tiles`, if each writes a partial sum.

    All programs run at once, and are few enough that adding their sums costs little.

    Args:
        num_warps: per program.
        resident_warps: that a multiprocessor's registers can hold.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    resident = processors * max(1, resident_warps // num_warps)
    return max(1, min(triton.cdiv(tiles, _TILES_PER_PROGRAM), resident))


def row_spec(
    name: str, kernel: Any, dtype: str, kinds: dict[str, str], constexprs: dict[str, Any], num_warps: int
) -> KernelSpec:
    """Return the spec of `kernel` for rows whose length is a multiple of 16.

    Args:
        dtype: value type of the pointers that `kinds` omits.
        kinds: types of the arguments other than strides, which are i64.
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
    """Return the specs of `kernel` at these widths, in bf16 and fp32, with every tile that a launch may use.

    Args:
        kernel: its name, without "_kernel", is the operator's name in `row_tile`.
        widths: values of D.
        kinds: as in `row_spec`.
        variants: name -> pointers that are None in this variant.
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
