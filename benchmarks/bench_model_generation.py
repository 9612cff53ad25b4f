"""Captions: how many per second in batches, and how long one takes, from pixels to tokens, with random weights.

`pytest benchmarks/bench_model_generation.py` prints the table: on a GPU LION-FlanT5-XL's sizes in bf16, on a CPU a
small model in fp32 with PyTorch alone. The measure is the original's eager form, its adapters one after the other and
its attention with a matrix of scores, under transformers' `generate`; every other way is timed only if its loss is that
form's, and says how many times as fast it is. Every answer has the same number of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.bench_model import DEVICE, DTYPE, LARGE, SMALL
from benchmarks.original import use_original_adapters
from lion_fast import LionConfig, LionForCausalLM

ON_GPU = DEVICE.type == "cuda"
NEW_TOKENS = 20 if ON_GPU else 4
PROMPT_TOKENS = 64  # tags and instruction
MANY = 64 if ON_GPU else 4


class Way(NamedTuple):
    """How the model is run."""

    kernel_backend: str = "torch"
    original: bool = False
    folded: bool = False
    cache: str | None = None  # transformers' `cache_implementation`; a static one's steps it compiles, with one beam


WAYS = {
    "original": Way(original=True),
    "PyTorch": Way(),
    "PyTorch, folded": Way(folded=True),
}
if ON_GPU:
    WAYS |= {
        "kernels": Way("triton"),
        "kernels, folded": Way("triton", folded=True),
        "kernels, folded, static cache": Way("triton", folded=True, cache="static"),
    }
JOBS = {f"{MANY} pictures, 5 beams": (MANY, 5), "1 picture, 1 beam": (1, 1), "1 picture, 5 beams": (1, 5)}
medians: dict[tuple[str, str], float] = {}


@functools.lru_cache(maxsize=1)  # one at a time: LION-FlanT5-XL takes 8 GB
def model(kernel_backend: str, original: bool) -> LionForCausalLM:
    """The adapters' up-projections, zero in a new model, are random."""
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
def expected_loss() -> float:
    return loss_of(model("torch", original=True))


@pytest.mark.parametrize("job", JOBS)  # all jobs of a way, then the next: a model is made once
@pytest.mark.parametrize("way", WAYS)
def bench(benchmark: Any, job: str, way: str) -> None:
    backend, original, folded, cache = WAYS[way]
    expected = expected_loss()
    lion = model(backend, original)
    pictures, beams = JOBS[job]
    batch = make_batch(pictures)
    search: dict[str, Any] = {"num_beams": beams, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    if cache is not None:
        search["cache_implementation"] = cache
    if folded:
        lion.fold_adapters()
    try:
        loss = loss_of(lion)
        allowed = 2e-2 if DTYPE.itemsize < 4 else 1e-5
        assert abs(loss - expected) <= allowed * abs(expected), f"wrong loss ({loss}, not {expected}), so no time"
        time(benchmark, lambda: lion.generate(**batch, **search))
    finally:
        lion.unfold_adapters()
    benchmark.group = f"LION, {job}, {NEW_TOKENS} tokens, {DTYPE}, {DEVICE.type}"
    medians[job, way] = benchmark.stats.stats.median
    benchmark.extra_info["captions per second"] = round(pictures / medians[job, way], 2)
    if (job, "original") in medians:
        benchmark.extra_info["times as fast as the original"] = round(medians[job, "original"] / medians[job, way], 2)


def time(benchmark: Any, generate: Callable[[], Tensor]) -> None:
    def run() -> None:
        ids = generate()
        if ON_GPU:
            torch.cuda.synchronize()
        assert ids.shape[1] == 1 + NEW_TOKENS

    run()  # compiles, and fills what is cached
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    benchmark(run)
    if ON_GPU:
        benchmark.extra_info["peak memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
