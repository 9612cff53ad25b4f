"""The whole model with random weights, compared with the original's form: prefix, training step and generation.

`pytest benchmarks` prints the table: on a GPU LION-FlanT5-XL's sizes in bf16 with both backends, on a CPU a small model
in fp32 with PyTorch's. All forms take turns on the same weights and inputs. A form is timed only if its loss matches
the original's and, on a CPU, its gradients in fp64 do. The floor is that of the matrix products and their weights only.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.side_by_side import DEVICE, DTYPE, INTERLEAVED, report, skip_after_deadline
from benchmarks.harness.work import Timed, timed
from benchmarks.original import original_lion
from benchmarks.shapes import ON_GPU
from lion_fast import LionConfig, LionForCausalLM
from lion_fast.check.compare import relative_error
from lion_fast.configuration_lion import FLAN_T5_XL
from lion_fast.training.stages import STAGES, freeze_for_stage

BACKENDS = ["torch", "triton"] if ON_GPU else ["torch"]
BATCH = 8 if ON_GPU else 2
IMAGE_SIZE = 224 if ON_GPU else 112
NEW_TOKENS = 16
SECONDS = 3.0  # for the turns of one job
# Relative bounds of the loss and of all gradients together. In fp32, the forms' losses differed by up to 2e-6 over
# several code paths of a CPU. The gradients of a model with random weights are ill-conditioned: in fp32, those of
# either form differ from fp64's by up to four per cent, depending on the CPU. They are therefore compared in fp64,
# where they differed by at most 5e-11. On a GPU they only need to be finite; the operators' own suites check them.
BOUNDS = (2e-2, math.inf) if DTYPE.itemsize < 4 else (1e-5, 1e-8)
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
SIZES = LARGE if ON_GPU else SMALL


def random_lion(backend: str, sizes: dict[str, Any], attention: str | None = None) -> LionForCausalLM:
    """Return a model with random up-projections of the adapters, which are zero in a new model."""
    config = LionConfig(kernel_backend=backend, **sizes)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = LionForCausalLM._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "up_proj" in name:
                parameter.normal_(std=0.02)
    return made


def build(backend: str, sizes: dict[str, Any]) -> LionForCausalLM:
    """Return the model for joint training."""
    made = random_lion(backend, sizes)
    # Logits of a few units, as in a trained model. A new head's are of tens, and give probabilities so small that they
    # slow the CPU down.
    with torch.no_grad():
        made.language_model.lm_head.weight.mul_(made.config.text_config.hidden_size**-0.5)
    freeze_for_stage(made, STAGES[-1])
    return made


@functools.cache
def model(backend: str) -> LionForCausalLM:
    return build(backend, SIZES).to(DTYPE)


def make_batch(pictures: int = BATCH, question: int = 32) -> dict[str, Tensor]:
    """Return prompts of 64 tokens and answers of 16, with one task per batch as in the original.

    Args:
        question: tokens of the Q-Former's text.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(2, 30000, (pictures, length), generator=generator)

    batch = {
        "pixel_values": torch.randn(pictures, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(DTYPE),
        "input_ids": ids(64),
        "qformer_input_ids": ids(question),
        "task_ids": torch.ones(pictures, dtype=torch.long),
        "labels": ids(16),
    }
    return {name: value.to(DEVICE) for name, value in batch.items()}


def one_sample(pictures: int, image_size: int = IMAGE_SIZE) -> dict[str, Tensor]:
    """Return a batch that repeats the texts of one sample, with different images."""
    batch = {name: value[:1].repeat_interleave(pictures, 0) for name, value in make_batch().items()}
    return {**batch, "pixel_values": torch.randn(pictures, 3, image_size, image_size, dtype=DTYPE, device=DEVICE)}


def prefix(lion: LionForCausalLM, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        lion.get_visual_prefix(lion.encode_images(batch["pixel_values"]), batch["qformer_input_ids"])


def training_step(lion: LionForCausalLM, batch: dict[str, Tensor]) -> None:
    lion(**batch).loss.backward()
    lion.zero_grad()


def generation(lion: LionForCausalLM, batch: dict[str, Tensor]) -> None:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    lion.generate(**inputs, num_beams=1, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


pytestmark = INTERLEAVED
JOBS = {"prefix": prefix, "training step": training_step, "generation": generation}
FORMS = ["original", *(f"lion_fast-{backend}" for backend in BACKENDS)]


@functools.cache
def forms() -> dict[str, LionForCausalLM]:
    return {
        "original": original_lion(model("torch")),
        **{f"lion_fast-{backend}": model(backend) for backend in BACKENDS},
    }


def loss_and_gradients(lion: LionForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradients of all trained parameters in one vector."""
    trained = [parameter for parameter in lion.parameters() if parameter.requires_grad]
    loss = lion(**batch).loss
    return loss.detach(), torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)])


def in_double(lion: LionForCausalLM, batch: dict[str, Tensor]) -> tuple[LionForCausalLM, dict[str, Tensor]]:
    return copy.deepcopy(lion).double(), {**batch, "pixel_values": batch["pixel_values"].double()}


def result_of(lion: LionForCausalLM) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradients, on a CPU in fp64."""
    loss, gradients = loss_and_gradients(lion.train(), make_batch())
    if not ON_GPU:
        _, gradients = loss_and_gradients(*in_double(lion, make_batch()))
    return loss, gradients


@functools.cache
def errors() -> dict[str, tuple[float, ...]]:
    """Return each form's errors of loss and gradients relative to the original's."""
    expected = [value.double() for value in result_of(forms()["original"])]
    return {name: tuple(map(relative_error, result_of(lion), expected)) for name, lion in forms().items()}


@functools.cache
def times(job: str) -> Timed:
    """Return the times of the correct forms."""
    batch = make_batch()
    right = [name for name in FORMS if all(map(float.__le__, errors()[name], BOUNDS))]
    for lion in forms().values():
        lion.train(job == "training step")
    calls = {name: functools.partial(JOBS[job], forms()[name], batch) for name in right}
    return timed(calls, forms()["original"].parameters(), SECONDS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("job", JOBS)
def bench(benchmark: Callable, job: str, form: str) -> None:
    skip_after_deadline()
    for name, error, bound in zip(("loss", "gradients"), errors()[form], BOUNDS, strict=True):
        assert error <= bound, f"wrong {name} (relative error {error:.1e}, allowed {bound:.1e}), so no time"
    seconds, peaks, floor = times(job)
    report(
        benchmark,
        seconds,
        form,
        baseline="original",
        group=f"LION, {job}, {BATCH} pictures",
        suite="model",
        direction=job,
        shape={"pictures": BATCH},
        floor_seconds=floor,
        peak_bytes=peaks[form],
        error=errors()[form][0],
        bound=BOUNDS[0],
    )
