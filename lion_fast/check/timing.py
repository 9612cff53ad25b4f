"""Timing on a GPU by its events, and the GPU's rates: copy bandwidth and matrix products."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lion_fast.io.reading import brief
from lion_kernels.core.cost import Device

WARM_UP = 3
REPETITIONS = 50
# Bytes read before every timed call, to clear the cache of any GPU. If they were written, the call would have to wait
# for the write-back.
COLD_BYTES = 2**30
# Before a call without a graph, the GPU is kept busy for about a millisecond while the host queues the call.
BUSY_CYCLES = 2_000_000
COPY_BYTES = 2**30
MATRIX_SIZE = 8192


@dataclass(frozen=True)
class Seconds:
    """Statistics of many calls: the median, and the bounds of the middle 60 %."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Call:
    """A call `run` to time on a GPU, and `prepare`, which precedes it each time.

    Attributes:
        refused: why the two are not CUDA graphs; None if they are. Without graphs, the time is the host's if that is
            longer than the device's.
    """

    prepare: Callable[[], object]
    run: Callable[[], object]
    refused: str | None = None


def captured(prepare: Callable[[], Any] | None, call: Callable[[Any], Any], device: torch.device) -> Call:
    """Return `call(prepare())` as two CUDA graphs, the second for `call`, or without graphs if capture fails.

    Replaying takes only the device's time, without the overhead of Python and launches. Both functions first run a few
    times, to compile what they need. If `prepare` is None, `call` receives None.
    """
    prepared = prepare or (lambda: None)
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call(prepared())
        refused = _waits(lambda: call(prepared()))
    current.wait_stream(stream)
    if refused is not None:
        return as_it_is(prepare, call, refused)
    before, timed = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    try:
        with _nothing_collected():
            given = None
            if prepare is not None:
                with torch.cuda.graph(before):
                    given = prepare()
            with torch.cuda.graph(timed, pool=before.pool() if prepare is not None else None):
                result = call(given)
    except RuntimeError as error:
        _recover(before, timed, current)
        return as_it_is(prepare, call, brief(error.__context__ or error))
    # Graphs write to the memory of their results, which must live as long as they do.
    kept = given, result
    return Call(before.replay if prepare is not None else lambda: None, lambda: (timed.replay(), kept)[0])


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Prevent freeing the memory of an earlier capture during a later one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _waits(call: Callable[[], object]) -> str | None:
    """Return why `call` cannot be captured if it synchronises, which is an error here rather than within a capture."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return brief(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def as_it_is(prepare: Callable[[], Any] | None, call: Callable[[Any], Any], refused: str) -> Call:
    """Return `call(prepare())` without graphs, for the reason `refused`."""
    given: list[Any] = [None]

    def before() -> None:
        given[0] = prepare() if prepare else None

    return Call(before, lambda: call(given[0]), refused)


_FAILED: list[torch.cuda.CUDAGraph] = []  # the allocator may still query them


def _recover(before: torch.cuda.CUDAGraph, timed: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
    """Restore the state after a failed capture, which PyTorch does not end.

    Its stream remains current, and the generator stays in capture mode, until a capture succeeds.
    """
    _FAILED.extend((before, timed))
    torch.cuda.set_stream(current)
    torch.cuda.synchronize(current.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=current.device)


class Clock:
    """Times calls by events, each with a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self.cold, self.sum = torch.zeros(COLD_BYTES // 4, device=device), torch.zeros((), device=device)

    def __call__(self, call: Call) -> Callable[[], float]:
        """Queue one call, and return a function that waits for it and returns its seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call.prepare()
        torch.sum(self.cold, dim=0, out=self.sum)
        if call.refused is not None:
            torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        call.run()
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return read


def measure(
    prepare: Callable[[], Any] | None,
    call: Callable[[Any], Any],
    device: torch.device,
    clock: Clock | None = None,
    repetitions: int = REPETITIONS,
) -> Seconds:
    """Return the time of `call(prepare())` minus that of `prepare` on a CUDA `device`, using `captured`."""
    clock, given = clock or Clock(device), captured(prepare, call, device)
    reads = [clock(given) for _ in range(repetitions)]
    return quantiles([read() for read in reads])


def quantiles(seconds: list[float]) -> Seconds:
    values = torch.tensor(seconds, dtype=torch.float64)
    median, low, high = (torch.quantile(values, q).item() for q in (0.5, 0.2, 0.8))
    return Seconds(median, low, high)


def measure_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Device:
    """Measure the rates of a large copy (bytes read and written) and large random matrix products on `device`."""
    clock = Clock(device)
    source, target = (torch.empty(COPY_BYTES, dtype=torch.int8, device=device) for _ in range(2))
    copied = measure(None, lambda _: target.copy_(source), device, clock, repetitions=20)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=dtype) for _ in range(2))
        product = measure(None, lambda _, a=a, b=b: torch.mm(a, b), device, clock, repetitions=10)
        rates[str(dtype).removeprefix("torch.")] = 2 * MATRIX_SIZE**3 / product.median
    return Device(torch.cuda.get_device_name(device), 2 * COPY_BYTES / copied.median, rates)
