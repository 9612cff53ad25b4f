"""Time on a GPU by its own events, and what the GPU reaches: its copy bandwidth and matrix rate."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lion_kernels.cost import Device

WARM_UP = 5
REPETITIONS = 50
# Written before every timed call: empties the cache of any GPU, and takes longer than queueing the call does.
COLD_BYTES = 2**30
COPY_BYTES = 2**30
MATRIX_SIZE = 8192


@dataclass(frozen=True)
class Seconds:
    """Of many calls: the median, and the bounds of the middle 60 %."""

    median: float
    low: float
    high: float


def measure(function: Callable[[], object], device: torch.device, repetitions: int = REPETITIONS) -> Seconds:
    """The time of `function` on a CUDA `device` with a cold cache, from events around each call."""
    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device)
    for _ in range(WARM_UP):
        function()
    pairs = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return quantiles([start.elapsed_time(end) / 1e3 for start, end in pairs])


def quantiles(seconds: list[float]) -> Seconds:
    values = torch.tensor(seconds, dtype=torch.float64)
    median, low, high = (torch.quantile(values, q).item() for q in (0.5, 0.2, 0.8))
    return Seconds(median, low, high)


def measure_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Device:
    """What a large copy (bytes read and written) and large matrix products of random data reach on `device`."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.int8, device=device) for _ in range(2))
    bandwidth = 2 * COPY_BYTES / measure(lambda: target.copy_(source), device).median
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=dtype) for _ in range(2))
        seconds = measure(lambda a=a, b=b: torch.mm(a, b), device, repetitions=10).median
        rates[str(dtype).removeprefix("torch.")] = 2 * MATRIX_SIZE**3 / seconds
    return Device(torch.cuda.get_device_name(device), bandwidth, rates)
