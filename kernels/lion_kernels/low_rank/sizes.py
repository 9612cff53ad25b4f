"""The launch sizes of the low-rank kernels: tiles, warps, stages and the other constants."""

from typing import Any, NamedTuple

import torch

from lion_kernels.core.backend import dot_precision
from lion_kernels.core.cost import H200, Cost, floor_seconds
from lion_kernels.core.tuned_sizes import lookup

# A channel gate with up to this many tasks is read as whole rows and selected from; a larger one is gathered by row.
_ROWS_CHOSEN_FROM = 4

# Bytes of hidden tiles that `update_kernel` holds in registers: a quarter of a multiprocessor's.
_HIDDEN_BYTES_HELD = 65536

# Speed of our matrix product relative to the library's for GPUs without a table: an assumption, not a measurement.
_ASSUMED_EFFICIENCY = 0.75


class Problem(NamedTuple):
    """The shape that determines tiles and every constexpr argument."""

    rows: int
    channels_in: int
    channels_out: int
    experts: int
    rank: int
    form: str
    dtype: torch.dtype
    named: int = 1  # experts that a row names: k of a sparse gate
    tasks: int = 1
    relu: bool = True
    has_down_bias: bool = True
    has_up_bias: bool = True
    has_residual: bool = True
    has_linear_bias: bool = False
    compact: bool = False  # whether the GPU `is_compact`

    @property
    def inner(self) -> int:
        return self.experts * self.rank

    @property
    def rows_class(self) -> str:
        return "decode" if self.rows <= 16 else "few" if self.rows <= 1024 else "many"

    @property
    def skip(self) -> bool:
        """Whether tiles skip experts that their rows do not name.

        Otherwise all experts are computed: with many rows, a tile names most of them, and memory rather than arithmetic
        is the limit.
        """
        return self.form == "sparse" and (self.rows <= 64 or self.inner > 256)

    @property
    def gathers(self) -> bool:
        """Whether a channel gate has too many tasks to read as whole rows."""
        return self.tasks > _ROWS_CHOSEN_FROM

    @property
    def group(self) -> int:
        """Experts per program of a backward kernel: the most that fit its registers and divide E."""
        fitting = max(1, (128 if self.dtype.itemsize == 2 else 64) // self._padded_rank)
        return max(size for size in range(1, self.experts + 1) if size <= fitting and self.experts % size == 0)

    @property
    def _padded_rank(self) -> int:
        return max(16, _power_of_2(self.rank))

    def tiles(self, kernel: str) -> dict[str, int]:
        """Return tile sizes, warps and stages of `kernel`: from the GPU's table, else sizes that compile everywhere."""
        decode, few, half = self.rows_class == "decode", self.rows_class != "many", self.dtype.itemsize == 2
        rows = 16 if few else 128 if half else 64  # fp32 tiles, without matrix units, must fit the registers
        default = {"num_warps": 4 if few else 8, "num_stages": 3 if half and not self.compact else 2}
        # With two warp groups, ptxas waits for every step of products split over channels or of several experts.
        one_warp_group = {"BM": 64, "num_warps": 4} if half and not few else {}
        if kernel == "hidden":
            inner = self._padded_rank if self.skip else max(16, _power_of_2(self.inner))
            block = 32 if self.rows_class == "few" else 128
            default |= {"BM": rows, "BF": min(block, inner), "BK": 128 if few else 64 if half else 32, **one_warp_group}
            if decode and self.skip and half and not self.compact:
                default |= {"BK": 64, "num_stages": 4}  # twice the channels of 64 ranks spill
        elif kernel == "update":
            default |= {"BM": 16 if decode else 128 if half and not few else 32, "BN": 32 if few or not half else 64}
            default |= {"num_stages": 2}
            if self.gathers and half and not few:
                default |= {"BN": 32, "num_warps": 4}  # gathered gates need registers too
        elif kernel == "linear":
            default |= {"BM": rows, "BN": 64 if few or not half else 128, "BK": 64 if half else 32, "GROUP": 8}
        elif kernel == "hidden_gradient":
            default |= {"BM": rows, "BK": 64 if half else 32, **one_warp_group}
            if self.form == "channel":
                default |= {"num_stages": 2}  # a third stage of gates spills on gfx942
            elif few and not half and not self.compact:
                default |= {"num_stages": 3}  # with two, Triton 3.9 targets 80 registers and spills
        elif kernel == "outer":
            default |= {"BN": 64 if half else 32, "BT": 64 if half else 16, "num_warps": 8}
        else:
            default |= {"BN": 32, "num_warps": 4, "num_stages": 1}
        return lookup(f"low_rank.{kernel}", self.rows_class, default)

    def constants(self, kernel: str, split: bool = False, gate_gradient: bool = False) -> dict[str, Any]:
        """Return every constexpr argument of `kernel`, and its warps and stages."""
        tiles = self.tiles(kernel)
        shape = {"E": self.experts, "RANK": self.rank}
        gate = {"RP": self._padded_rank, "TASKS": self.tasks, "CHANNEL": self.form == "channel"}
        names = {"K": self.named, "KP": _power_of_2(self.named), "SKIP": self.skip}
        choice = {"CHOOSE": not self.gathers}
        group = {"EG": self.group, "GP": max(16, _power_of_2(self.group))}
        precision = {"PRECISION": dot_precision(self.dtype)}
        hidden = {"HAS_DOWN_BIAS": self.has_down_bias, "RELU": self.relu, "SPLIT": split}
        if kernel == "hidden":
            return {
                **shape, **names, **tiles, **precision, "HAS_BIAS": self.has_down_bias, "RELU": self.relu,
                "SPLIT": split,
            }  # fmt: skip
        if kernel == "update":
            held = tiles["BM"] * self.experts * self._padded_rank * self.dtype.itemsize
            return {
                **shape, **gate, **names, **choice, **hidden, **tiles, **precision, "HAS_BIAS": self.has_up_bias,
                "HAS_RESIDUAL": self.has_residual,
                "EP": max(16, _power_of_2(self.experts)), "KEEP": not self.skip and held <= _HIDDEN_BYTES_HELD,
            }  # fmt: skip
        if kernel == "linear":
            padded = {"EP": max(16, _power_of_2(self.experts))}
            bias = {"HAS_LINEAR_BIAS": self.has_linear_bias}
            return {**shape, **gate, **names, **choice, **padded, **tiles, **precision, **bias, "SPLIT": split}
        if kernel == "hidden_gradient":
            return {
                **shape, **gate, **names, **choice, **group, **tiles, **precision, "HAS_BIAS": self.has_up_bias,
                "RELU": self.relu, "GATE_GRADIENT": gate_gradient,
            }  # fmt: skip
        if kernel == "outer":
            return {**shape, **gate, **group, **tiles, **precision, "BI": 128}
        return {**shape, **gate, **tiles, "HAS_BIAS": self.has_up_bias}


def fuses(rows: int, channels_in: int, channels_out: int, dtype: torch.dtype) -> bool:
    """Return whether the tile loop of x W^T includes the update: by the GPU's table, else by comparing costs."""
    by_cost = False
    if dtype.itemsize == 2:
        product = Cost(
            (rows * (channels_in + channels_out) + channels_in * channels_out) * dtype.itemsize,
            2 * rows * channels_in * channels_out,
        )
        ours = Cost(product.bytes, int(product.flops / _ASSUMED_EFFICIENCY))
        added = Cost(2 * rows * channels_out * dtype.itemsize, 0)
        library = floor_seconds(product, H200, dtype) + floor_seconds(added, H200, dtype)
        by_cost = floor_seconds(ours, H200, dtype) < library
    width = "narrow" if channels_in <= 1024 else "wide"
    rows_class = "decode" if rows <= 16 else "few" if rows <= 1024 else "many"
    return lookup("mixture_of_lora_linear", f"{rows_class}-{width}", {"fused": by_cost})["fused"]


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _power_of_2(number: int) -> int:
    """Return the smallest power of two not less than `number`."""
    return 1 << (number - 1).bit_length()
