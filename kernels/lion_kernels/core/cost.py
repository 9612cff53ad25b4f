"""The least time an operator can take, from the bytes it must move, its operations, and a device's rates."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """The minimum of one call: `bytes` between memory and chip, and `flops` (a multiply-add is two)."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Device:
    """Rates that a device reaches, per dtype name ("bfloat16") for arithmetic."""

    name: str
    bytes_per_second: float
    flops_per_second: dict[str, float]


# Both measured: a copy of a large tensor, and large matrix products.
H200 = Device("NVIDIA H200", 4.3e12, {"bfloat16": 790e12, "float16": 790e12})


def floor_seconds(cost: Cost, device: Device, dtype: torch.dtype) -> float:
    """Return a lower bound on any implementation's time: the larger of `cost`'s two times on `device`.

    Raises:
        ValueError: `device` has no measured rate for `dtype`.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in device.flops_per_second:
        known = ", ".join(device.flops_per_second)
        raise ValueError(f"dtype: expected one measured on {device.name} ({known}), got {name}")
    return max(cost.bytes / device.bytes_per_second, cost.flops / device.flops_per_second[name])
