"""The launches of the whole model at the published sizes: training in every stage, evaluation, and generation.

Models with one layer of each kind have all shapes of the full models. Nothing is computed (`Uncomputed`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_fast.check.cases import CASES, TIMED
from lion_fast.check.launches import Recording, record_cases, recording
from lion_fast.check.report import TIMED_DTYPE
from lion_fast.check.uncomputed import Uncomputed
from lion_fast.configuration_lion import FLAN_T5_XL, FLAN_T5_XXL, LionConfig
from lion_fast.inference.loading import quiet_transformers
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.training.stages import STAGES, Stage, convert_frozen, freeze_for_stage
from lion_kernels.core.specs import KernelSpec

SIZES = {"XL": FLAN_T5_XL, "XXL": FLAN_T5_XXL}
TRAINING_BATCH = 16


class Lengths(NamedTuple):
    """Tokens of the prompt, the Q-Former's question and the answer; whether samples differ in length and are padded."""

    text: int
    question: int
    answer: int
    padded: bool


USUAL = Lengths(128, 32, 32, padded=True)  # with the visual prefix of 289, the encoder's input has 417
BENCHMARKED = Lengths(64, 32, 16, padded=False)  # as in benchmarks/bench_training_step.py
GENERATIONS = tuple((batch, beams) for batch in (1, 8) for beams in (1, 5))
NEW_TOKENS = 3  # one step without a cache, and two with it


def recorded_launches() -> list[KernelSpec]:
    """Return the launches of `lion-fast check` on a GPU, except those in float16, and of the model in bfloat16."""
    with recording() as found:
        for dtype in (torch.bfloat16, torch.float32):
            record_cases(found, CASES, dtype)
        record_cases(found, TIMED, TIMED_DTYPE)
        record_models(found)
    return found.specs()


def record_models(found: Recording) -> None:
    """Record LION-FlanT5-XL and -XXL; training stages run under autocast, as in `lion-fast train`."""
    found.model_sizes = True
    with quiet_transformers(), Uncomputed():
        for size, text in SIZES.items():
            for stage in STAGES:
                _train(found, size, text, stage)
            model: Any = _model(text, STAGES[-1]).eval()
            model.to(torch.bfloat16)
            for batch, beams in GENERATIONS:
                found.call = f"{size}: generation, {batch} with {beams} {'beam' if beams == 1 else 'beams'}"
                _generate(model, batch, beams)


def benchmarked_step() -> None:
    """Run a step of joint training of LION-FlanT5-XL with its loss, as in the training benchmark."""
    with quiet_transformers(), Uncomputed():
        _train(Recording(), "XL", FLAN_T5_XL, STAGES[-1], BENCHMARKED)


def _model(text: dict[str, Any], stage: Stage) -> LionForCausalLM:
    return LionForCausalLM(
        LionConfig(
            text_config={**text, "num_layers": 1, "num_decoder_layers": 1},
            vision_config={"num_hidden_layers": 3},
            aggregator_config={"feature_layers": (2, 1, 0)},
            qformer_config={"num_hidden_layers": 1},
            visual_input=stage.visual_input,
            kernel_backend="triton",
        )
    )


def _train(found: Recording, size: str, text: dict[str, Any], stage: Stage, lengths: Lengths = USUAL) -> None:
    """Record a forward and backward pass, and an evaluation's forward."""
    model = _model(text, stage)
    freeze_for_stage(model, stage)
    convert_frozen(model, torch.bfloat16)
    batch = _batch(model.config, TRAINING_BATCH, lengths)
    labels = torch.ones(TRAINING_BATCH, lengths.answer, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.call = f"{size}: training, stage {stage.number}"
        model.train()(**batch, labels=labels).loss.backward()
        found.call = f"{size}: evaluation, stage {stage.number}"
        with torch.no_grad():
            model.eval()(**batch, labels=labels)


def _generate(model: LionForCausalLM, batch: int, beams: int) -> None:
    given: dict[str, Any] = _batch(model.config, batch)
    pixels = given.pop("pixel_values").to(torch.bfloat16)
    model.generate(pixel_values=pixels, **given, num_beams=beams, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


def _batch(config: LionConfig, size: int, lengths: Lengths = USUAL) -> dict[str, Tensor]:
    pixels = config.vision_config.image_size
    question = torch.ones(size, lengths.question, dtype=torch.long)
    batch = {
        "pixel_values": torch.zeros(size, 3, pixels, pixels),
        "input_ids": torch.ones(size, lengths.text, dtype=torch.long),
        "qformer_input_ids": question,
        "task_ids": torch.arange(size) % config.text_config.num_tasks,
    }
    if lengths.padded:
        mask = torch.ones(size, lengths.text, dtype=torch.long)
        mask[:-1, -1] = 0
        batch |= {"attention_mask": mask, "qformer_attention_mask": question.clone()}
    return batch
