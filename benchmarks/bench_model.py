"""The whole model with random weights: its prefix, a step of joint training, and generation, by kernel backend.

`pytest benchmarks` prints the table: on a GPU LION-FlanT5-XL's sizes in bf16 with both backends, on a CPU a small model
in fp32 with PyTorch's. A backend is timed only if its loss is PyTorch's.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_fast import LionConfig, LionForCausalLM
from lion_fast.configuration_lion import FLAN_T5_XL
from lion_fast.stages import STAGES, freeze_for_stage

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BACKENDS = ["torch", "triton"] if DEVICE.type == "cuda" else ["torch"]
BATCH = 8 if DEVICE.type == "cuda" else 2
NEW_TOKENS = 16
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LARGE: dict[str, Any] = {
    "text_config": {**FLAN_T5_XL, "dropout_rate": 0.0},
    "qformer_config": NO_DROPOUT,
    "aggregator_config": NO_DROPOUT,
}
SMALL: dict[str, Any] = {
    "text_config": {
        **FLAN_T5_XL,
        "dropout_rate": 0.0,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 320,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
    },
    "vision_config": {
        "hidden_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 768,
        "image_size": 112,
    },
    "qformer_config": {
        **NO_DROPOUT,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 192,
    },
    "aggregator_config": {
        **NO_DROPOUT,
        "hidden_size": 176,
        "num_attention_heads": 2,
        "intermediate_size": 384,
        "feature_layers": [3, 2, 1],
        "projection_size": 352,
    },
}


def build(backend: str, sizes: dict[str, Any]) -> LionForCausalLM:
    """For joint training; the adapters' up-projections, zero in a new model, are random."""
    config = LionConfig(kernel_backend=backend, **sizes)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = LionForCausalLM(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "up_proj" in name:
                parameter.normal_(std=0.02)
        # As trained, logits of a few units; a new head's are of tens, whose probabilities are too small for the CPU to
        # compute with at full speed.
        made.language_model.lm_head.weight.mul_(config.text_config.hidden_size**-0.5)
    freeze_for_stage(made, STAGES[-1])
    return made


@functools.lru_cache(maxsize=1)  # one at a time: LION-FlanT5-XL takes 10 GB
def model(backend: str) -> LionForCausalLM:
    return build(backend, LARGE if DEVICE.type == "cuda" else SMALL).to(DTYPE)


def make_batch() -> dict[str, Tensor]:
    """Questions of 64 tokens and answers of 16, tasks alternating."""
    generator = torch.Generator().manual_seed(0)
    size = 224 if DEVICE.type == "cuda" else 112

    def ids(length: int) -> Tensor:
        return torch.randint(2, 30000, (BATCH, length), generator=generator)

    batch = {
        "pixel_values": torch.randn(BATCH, 3, size, size, generator=generator).to(DTYPE),
        "input_ids": ids(64),
        "qformer_input_ids": ids(32),
        "task_ids": torch.arange(BATCH) % 2,
        "labels": ids(16),
    }
    return {name: value.to(DEVICE) for name, value in batch.items()}


def prefix(lion: LionForCausalLM, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        lion.get_visual_prefix(lion.encode_images(batch["pixel_values"]), batch["qformer_input_ids"])


def training_step(lion: LionForCausalLM, batch: dict[str, Tensor]) -> None:
    lion(**batch).loss.backward()
    lion.zero_grad()


def generation(lion: LionForCausalLM, batch: dict[str, Tensor]) -> None:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    lion.generate(**inputs, num_beams=1, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


@functools.cache
def expected_loss() -> float:
    with torch.no_grad():
        return model("torch").eval()(**make_batch()).loss.item()


@pytest.mark.parametrize("job", [prefix, training_step, generation], ids=lambda job: job.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def bench(benchmark: Callable, backend: str, job: Callable[..., None]) -> None:
    expected, batch = expected_loss(), make_batch()
    lion = model(backend).train(job is training_step)
    with torch.no_grad():
        loss = lion(**batch).loss.item()
    allowed = 2e-2 if DTYPE.itemsize < 4 else 1e-5
    assert abs(loss - expected) <= allowed * abs(expected), f"wrong loss ({loss}, not {expected}), so no time"

    def run() -> None:
        job(lion, batch)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"LION, {job.__name__.replace('_', ' ')}, {BATCH} pictures, {DTYPE}, {DEVICE.type}"
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        benchmark.extra_info["peak memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    benchmark(run)
