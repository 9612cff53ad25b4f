"""Growth of a training step and a prefix with batch and image size, in PyTorch on a CPU: the report's curves.

The model is `bench_model.SMALL`, with interpolated positions for other image sizes. The sizes of a curve take turns.
Tokens, adapters and rank vary in `bench_mixture_of_adapters` and `bench_mixture_of_lora_linear`.
"""

import copy
import functools
from collections.abc import Callable

import pytest

from benchmarks import bench_model
from benchmarks.harness.side_by_side import DEVICE, INTERLEAVED, alternate, report, skip_after_deadline

AXES = {"batch": (1, 2, 4, 8), "image size": (56, 112, 168, 224, 336)}
SECONDS = 3.0
pytestmark = [INTERLEAVED, pytest.mark.skipif(DEVICE.type != "cpu", reason="measures the CPU")]


@functools.cache
def curve(axis: str) -> dict[str, list[float]]:
    lion = bench_model.model("torch").train()
    calls = {}
    for value in AXES[axis]:
        size, image_size = (value, 112) if axis == "batch" else (1, value)
        resized = copy.deepcopy(lion)
        resized.set_image_size(image_size)
        batch = bench_model.one_sample(size, image_size)
        calls[str(value)] = functools.partial(bench_model.training_step, resized, batch)
    return alternate(calls, SECONDS)


@pytest.mark.parametrize(("axis", "value"), [(axis, value) for axis, values in AXES.items() for value in values])
def bench(benchmark: Callable, axis: str, value: int) -> None:
    skip_after_deadline()
    fixed = {"image size": 112} if axis == "batch" else {"batch": 1}
    report(
        benchmark,
        {"lion_fast": curve(axis)[str(value)]},
        "lion_fast",
        baseline="",
        group=f"training step, {axis} {value}",
        suite="growth",
        direction="training step",
        shape={axis: value, **fixed},
    )
