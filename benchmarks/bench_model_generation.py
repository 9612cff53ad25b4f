"""Captions per second in batches, and the latency of one, from pixels to tokens, with random weights.

`pytest benchmarks/bench_model_generation.py` prints the table: on a GPU LION-FlanT5-XL's sizes in bf16, on a CPU a
small model in fp32 with PyTorch alone. The baseline is the original's eager form, with adapters one after the other and
attention with a matrix of scores, under transformers' `generate`. Every other way takes turns with it, and is timed
only if its loss matches. All answers have the same number of tokens. The floor is that of the original form's matrix
products and their weights alone.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.bench_model import ON_GPU, SIZES, make_batch, random_lion
from benchmarks.harness.side_by_side import DTYPE, INTERLEAVED, report, skip_after_deadline
from benchmarks.harness.work import Timed, timed
from benchmarks.original import use_original_adapters
from lion_fast import LionForCausalLM
from lion_fast.check.timing import quantiles

NEW_TOKENS = 20 if ON_GPU else 4
QUESTION = 12  # tokens of the Q-Former's text
BOUND = 2e-2 if DTYPE.itemsize < 4 else 1e-5  # relative, of the loss
SECONDS = 60.0 if ON_GPU else 3.0  # for the turns of one job
MANY = 64 if ON_GPU else 4


class Way(NamedTuple):
    """A way to run the model."""

    kernel_backend: str = "torch"
    original: bool = False
    folded: bool = False
    cache: str | None = None  # transformers' `cache_implementation`; it compiles steps with a static one and one beam


WAYS = {
    "original": Way(original=True),
    "lion_fast-torch": Way(),
    "lion_fast-torch, folded": Way(folded=True),
}
if ON_GPU:
    WAYS |= {
        "lion_fast-triton": Way("triton"),
        "lion_fast-triton, folded": Way("triton", folded=True),
        "lion_fast-triton, folded, static cache": Way("triton", folded=True, cache="static"),
    }
JOBS = {f"{MANY} pictures, 5 beams": (MANY, 5), "1 picture, 1 beam": (1, 1), "1 picture, 5 beams": (1, 5)}
pytestmark = INTERLEAVED


@functools.cache
def model(kernel_backend: str, original: bool) -> LionForCausalLM:
    made = random_lion(kernel_backend, SIZES, "eager" if original else None)
    if original:
        use_original_adapters(made)
    return made.requires_grad_(False).to(DTYPE).eval()


@functools.cache
def folded(kernel_backend: str, original: bool) -> LionForCausalLM:
    """Return a folded model that shares the parameters of `model`."""
    source = model(kernel_backend, original)
    twin = copy.deepcopy(source, {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())})
    twin.fold_adapters()
    return twin


@torch.no_grad()
def loss_of(lion: LionForCausalLM) -> float:
    batch = make_batch(2, QUESTION)
    return lion(**batch | {"labels": batch["input_ids"][:, :NEW_TOKENS]}).loss.item()


@functools.cache
def error(way: str) -> float:
    """Return the relative difference between the losses of a way and the original form."""
    expected = loss_of(model("torch", True))
    return abs(loss_of(lion_of(WAYS[way])) - expected) / abs(expected)


def lion_of(way: Way) -> LionForCausalLM:
    return (folded if way.folded else model)(way.kernel_backend, way.original)


def captioning(way: Way, job: str) -> Callable[[], None]:
    pictures, beams = JOBS[job]
    lion, batch = lion_of(way), make_batch(pictures, QUESTION)
    del batch["labels"]
    search: dict[str, Any] = {"num_beams": beams, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    if way.cache is not None:
        search["cache_implementation"] = way.cache

    def run() -> None:
        assert lion.generate(**batch, **search).shape[1] == 1 + NEW_TOKENS

    return run


@functools.cache
def times(job: str) -> Timed:
    """Return the times of the correct ways."""
    calls = {name: captioning(way, job) for name, way in WAYS.items() if error(name) <= BOUND}
    for call in calls.values():
        call()  # compiles, and fills caches
    return timed(calls, lion_of(WAYS["original"]).parameters(), SECONDS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("job", JOBS)
def bench(benchmark: Any, job: str, way: str) -> None:
    skip_after_deadline()
    assert error(way) <= BOUND, f"wrong loss (relative error {error(way):.1e}, allowed {BOUND:.1e}), so no time"
    seconds, peaks, floor = times(job)
    pictures, beams = JOBS[job]
    report(
        benchmark,
        seconds,
        way,
        baseline="original",
        group=f"LION, {job}, {NEW_TOKENS} tokens",
        suite="model_generation",
        direction="generation",
        shape={"pictures": pictures, "beams": beams},
        floor_seconds=floor,
        peak_bytes=peaks[way],
        error=error(way),
        bound=BOUND,
    )
    benchmark.extra_info["captions per second"] = round(pictures / quantiles(seconds[way]).median, 2)
