"""Time on a GPU by its own events, and what the GPU reaches: its copy bandwidth and matrix rate."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lion_kernels.core.cost import Device

WARM_UP = 3
REPETITIONS = 50
# Read before every timed call: empties the cache of any GPU. Were it written, the call would have to wait until its
# lines are in memory.
COLD_BYTES = 2**30
# Before a call that is no graph the GPU is kept busy for about a millisecond, in which the host queues the call.
BUSY_CYCLES = 2_000_000
COPY_BYTES = 2**30
MATRIX_SIZE = 8192


@dataclass(frozen=True)
class Seconds:
    """Of many calls: the median, and the bounds of the middle 60 %."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Call:
    """What is timed on a GPU, `run`, and what comes before it each time, `prepare`.

    Attributes:
        refused: why the two are no CUDA graphs; None where they are. Without one, the host's time shows where it is
            longer than the device's.
    """

    prepare: Callable[[], object]
    run: Callable[[], object]
    refused: str | None = None


def captured(prepare: Callable[[], Any] | None, call: Callable[[Any], Any], device: torch.device) -> Call:
    """`call(prepare())` as two CUDA graphs of which the second is `call`, or as it is where it cannot be captured.

    A replay takes the device's time alone, so that neither Python nor a launch shows. Each is called a few times first,
    which compiles what is to be compiled. `prepare` None stands for nothing, and gives `call` None.
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
        return as_it_is(prepare, call, _in_short(error.__context__ or error))
    # Graphs write to the memory of what they have returned, which is held as long as they are.
    kept = given, result
    return Call(before.replay if prepare is not None else lambda: None, lambda: (timed.replay(), kept)[0])


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What an earlier capture holds is not freed within a later one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _waits(call: Callable[[], object]) -> str | None:
    """Why `call` cannot be captured, where it waits for the device: an error here, and not within a capture."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return _in_short(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def as_it_is(prepare: Callable[[], Any] | None, call: Callable[[Any], Any], refused: str) -> Call:
    """`call(prepare())` without graphs; `refused` says why."""
    given: list[Any] = [None]

    def before() -> None:
        given[0] = prepare() if prepare else None

    return Call(before, lambda: call(given[0]), refused)


_FAILED: list[torch.cuda.CUDAGraph] = []  # the allocator may still ask them


def _recover(before: torch.cuda.CUDAGraph, timed: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
    """After a capture that failed, which PyTorch does not end: its stream stays the current one, and the generator
    believes in a capture, until one succeeds."""
    _FAILED.extend((before, timed))
    torch.cuda.set_stream(current)
    torch.cuda.synchronize(current.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=current.device)


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


class Clock:
    """Times calls by events, each with a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self.cold, self.sum = torch.zeros(COLD_BYTES // 4, device=device), torch.zeros((), device=device)

    def __call__(self, call: Call) -> Callable[[], float]:
        """Queues one call; what it returns waits for it and gives its seconds."""
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
    """The time of `call(prepare())`, less that of `prepare`, on a CUDA `device`, as `captured` has it."""
    clock, given = clock or Clock(device), captured(prepare, call, device)
    reads = [clock(given) for _ in range(repetitions)]
    return quantiles([read() for read in reads])


def quantiles(seconds: list[float]) -> Seconds:
    values = torch.tensor(seconds, dtype=torch.float64)
    median, low, high = (torch.quantile(values, q).item() for q in (0.5, 0.2, 0.8))
    return Seconds(median, low, high)


def measure_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Device:
    """What a large copy (bytes read and written) and large matrix products of random data reach on `device`."""
    clock = Clock(device)
    source, target = (torch.empty(COPY_BYTES, dtype=torch.int8, device=device) for _ in range(2))
    copied = measure(None, lambda _: target.copy_(source), device, clock, repetitions=20)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=dtype) for _ in range(2))
        product = measure(None, lambda _, a=a, b=b: torch.mm(a, b), device, clock, repetitions=10)
        rates[str(dtype).removeprefix("torch.")] = 2 * MATRIX_SIZE**3 / product.median
    return Device(torch.cuda.get_device_name(device), 2 * COPY_BYTES / copied.median, rates)
