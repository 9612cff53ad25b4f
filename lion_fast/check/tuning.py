"""Search for the fastest tile sizes on the local GPU, written as its table (`core.tuned_sizes`).

The tunable entries are those that the operators look up on the model's own shapes. Each size is varied alone, and the
best value is kept for the next. A value must give the same result up to rounding, and a gain beyond the spread.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lion_fast.check.cases import CASES, TIMED, Case
from lion_fast.check.compare import Draw, leaves, make_tensors, relative_error, results_of
from lion_fast.check.timing import Clock, Seconds, measure
from lion_fast.io.atomic import write_json
from lion_fast.io.owning import made_directories
from lion_kernels.core import tuned_sizes

Key = tuple[str, str]  # an operator's name in the table, and the shape class
Sizes = dict[str, Any]
TRIALS = 20  # timed calls per candidate


@dataclass(frozen=True)
class Found:
    """The result for one entry of the table: the best sizes, and the times before and after in seconds."""

    key: Key
    sizes: Sizes
    before: float
    after: float
    tried: int
    refused: int


def candidates(name: str, value: Any) -> list[Any]:
    """Return other values for one size; none for a width, which follows from the shape."""
    if isinstance(value, bool):
        return [not value]
    if name == "num_warps":
        return [number for number in (1, 2, 4, 8, 16) if number != value]
    if name == "num_stages":
        return [number for number in (1, 2, 3, 4) if number != value]
    if name == "BD":
        return []
    return [size for size in (value // 2, 2 * value) if size >= 1]


def looked_up(case: Case, device: torch.device, dtype: torch.dtype) -> dict[Key, Sizes]:
    """Return the defaults of all entries that forward and backward of `case` look up."""
    with tuned_sizes.overriding({}) as seen:
        results_of(case.run, leaves(make_tensors(case, dtype, device)))
    return seen


def tune(
    cases: tuple[Case, ...],
    device: torch.device,
    dtype: torch.dtype,
    deadline: float,
    clock: Callable[[Callable[[], object]], Seconds],
) -> Iterator[Found]:
    """Tune the entries of `cases` in turn, timing the whole call, until `deadline` (in `time.time()`)."""
    best: dict[Key, Sizes] = {}
    for case in cases:
        tensors, draw = make_tensors(case, dtype, device), Draw(device)
        with tuned_sizes.overriding({}) as seen:
            expected = results_of(case.run, leaves(tensors), draw)
        for key, default in seen.items():
            if key in best or time.time() > deadline:
                continue
            found = _tune_one(case, tensors, draw, expected, key, default, best, deadline, clock)
            best[key] = found.sizes
            yield found


def _tune_one(case, tensors, draw, expected, key, default, best, deadline, clock) -> Found:
    def run(sizes: Sizes) -> Seconds:
        with tuned_sizes.overriding({**best, key: sizes}):
            inputs = leaves(tensors)
            got = results_of(case.run, inputs, draw)
            for name, value in got.items():
                if not relative_error(value, expected[name].double()) <= allowed(value.dtype):
                    raise ArithmeticError(f"{name} differs")
            return clock(lambda: results_of(case.run, inputs, draw))

    sizes, time_of = dict(default), run(dict(default))
    before, tried, refused = time_of.median, 0, 0
    for name, value in default.items():
        for other in candidates(name, value):
            if time.time() > deadline:
                break
            tried += 1
            try:
                seconds = run({**sizes, name: other})
            except Exception:  # too large for the GPU, not compilable, or wrong: count it and keep the sizes
                refused += 1
                continue
            if seconds.high < time_of.low:
                sizes, time_of = {**sizes, name: other}, seconds
    return Found(key, sizes, before, time_of.median, tried, refused)


def allowed(dtype: torch.dtype) -> float:
    """Return the relative difference allowed between results of different sizes: summation orders and rounding."""
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def run(out: Path | None, seconds: float, dry_run: bool) -> int:
    """Tune on the local GPU, write `out`, by default the kernels' own table, and return the number of entries.

    A dry run lists the tunable entries and tries one candidate in Triton's interpreter, on small shapes; it neither
    measures nor writes.

    Raises:
        ValueError: there is no GPU, and it is not a dry run.
    """
    if dry_run:
        return _dry_run()
    if not torch.cuda.is_available():
        raise ValueError("--tune measures on a GPU and finds none here; --dry-run shows what it would tune")
    device = torch.device("cuda", torch.cuda.current_device())
    target = out or tuned_sizes.FOLDER / tuned_sizes.file_name(torch.cuda.get_device_name(device))
    entries: dict[str, dict[str, Sizes]] = {}
    cold = Clock(device)
    clock = lambda call: measure(None, lambda _: call(), device, cold, TRIALS)  # noqa: E731
    for found in tune(TIMED, device, torch.bfloat16, time.time() + seconds, clock):
        operator, shape_class = found.key
        print(_line(found), flush=True)
        if found.after < found.before:
            entries.setdefault(operator, {})[shape_class] = found.sizes
            with made_directories(target.parent):
                write_json(target, entries)  # after each entry, in case of interruption
    count = sum(map(len, entries.values()))
    print(f"{count} entries better than the default{f', written to {target}' if count else ''}")
    return count


def _line(found: Found) -> str:
    operator, shape_class = found.key
    gain = f"{1e6 * found.before:.1f} -> {1e6 * found.after:.1f} us"
    return f"{operator}, {shape_class}: {gain}, tried {found.tried}, refused {found.refused}: {found.sizes}"


def _dry_run() -> int:
    device, count = torch.device("cpu"), 0
    smallest = {case.operator: case for case in CASES}  # each operator's last case
    for case in smallest.values():
        for (operator, shape_class), default in looked_up(case, device, torch.float32).items():
            number = sum(len(candidates(name, value)) for name, value in default.items())
            print(f"{operator}, {shape_class}: {number} candidates around {default}")
            count += 1
    case = smallest["rms_norm"]
    calls = []
    clock = lambda call: (calls.append(call()), Seconds(1.0, 1.0, 1.0))[1]  # noqa: E731
    for found in tune((case,), device, torch.float32, time.time() + 60, clock):
        print(f"tried {found.tried} candidates of {found.key[0]}, refused {found.refused}")
    print(f"dry run: {count} entries could be tuned here; nothing was measured or written")
    return count
