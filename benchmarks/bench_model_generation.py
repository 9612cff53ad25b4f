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
from torch import Tensor

from benchmarks.bench_model import LARGE, SMALL
from benchmarks.harness.side_by_side import DEVICE, DTYPE, INTERLEAVED, report, skip_after_deadline
from benchmarks.harness.work import Timed, timed
from benchmarks.original import use_original_adapters
from lion_fast import LionConfig, LionForCausalLM
from lion_fast.check.timing import quantiles

ON_GPU = DEVICE.type == "cuda"
NEW_TOKENS = 20 if ON_GPU else 4
PROMPT_TOKENS = 64  # tags and instruction
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
    """Return a model with random up-projections of the adapters, which are zero in a new model."""
    config = LionConfig(kernel_backend=kernel_backend, **(LARGE if ON_GPU else SMALL))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = LionForCausalLM._from_config(config, attn_implementation="eager" if original else None)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "up_proj" in name:
                parameter.normal_(std=0.02)
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


def make_batch(pictures: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = 224 if ON_GPU else 112
    batch = {
        "pixel_values": torch.randn(pictures, 3, size, size, generator=generator).to(DTYPE),
        "input_ids": torch.randint(2, 30000, (pictures, PROMPT_TOKENS), generator=generator),
        "qformer_input_ids": torch.randint(2, 30000, (pictures, 12), generator=generator),
        "task_ids": torch.ones(pictures, dtype=torch.long),
    }
    return {name: value.to(DEVICE) for name, value in batch.items()}


@torch.no_grad()
def loss_of(lion: LionForCausalLM) -> float:
    batch = make_batch(2)
    return lion(**batch, labels=batch["input_ids"][:, :NEW_TOKENS]).loss.item()


@functools.cache
def error(way: str) -> float:
    """Return the relative difference between the losses of a way and the original form."""
    expected = loss_of(model("torch", True))
    return abs(loss_of(lion_of(WAYS[way])) - expected) / abs(expected)


def lion_of(way: Way) -> LionForCausalLM:
    return (folded if way.folded else model)(way.kernel_backend, way.original)


def captioning(way: Way, job: str) -> Callable[[], None]:
    pictures, beams = JOBS[job]
    lion, batch = lion_of(way), make_batch(pictures)
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
        dtype=str(DTYPE).removeprefix("torch."),
        floor_seconds=floor,
        peak_bytes=peaks[way],
        error=error(way),
        bound=BOUND,
    )
    benchmark.extra_info["captions per second"] = round(pictures / quantiles(seconds[way]).median, 2)
