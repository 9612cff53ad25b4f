"""Evaluation of captions, answers and boxes on unseen scenes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.quickstart.data import SceneSet, encode
from lion_fast.scenes import Sample
from lion_fast.training import evaluation

_GREEDY = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 48}
_BATCH_SIZE = 128


@dataclass(frozen=True)
class Metrics:
    """Metrics between 0 and 1."""

    caption_exact_match: float
    question_accuracy: float
    grounding_accuracy: float  # fraction of boxes with IoU >= 0.5; an answer without a box is wrong

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def answer(
    model: LionForCausalLM,
    processor: LionProcessor,
    scene_set: SceneSet,
    indices: Sequence[int],
    samples: Sequence[Sample],
    tags: Sequence[str] | None = None,
) -> tuple[list[str], dict[str, float]]:
    """Return the model's greedy answers to `samples` and their metrics.

    Args:
        indices: index of each sample's scene.
        tags: one string per scene.
    """

    def collate(asked: Sequence[Any]) -> dict[str, Tensor]:
        chosen: list[int] = [each["scene"] for each in asked]
        told = None if tags is None else [tags[i] for i in chosen]
        batch = encode(processor, [each["sample"] for each in asked], told)
        del batch["labels"]  # the loss would take as long as the answers, and is not shown
        if scene_set.features is None:
            return {**batch, "pixel_values": scene_set.pixel_values(chosen)}
        # The cache holds all layers; a model without the aggregator reads only the first one, the last layer.
        return {**batch, "vision_features": scene_set.features[chosen, : len(model.config.feature_layers)].float()}

    pairs = zip(indices, samples, strict=True)
    asked: Any = [{"scene": index, "sample": sample, "answer": sample.answer} for index, sample in pairs]
    metrics, answered = evaluation.evaluate(
        model.eval(),
        processor,
        asked,
        indices=range(len(asked)),
        batch_size=_BATCH_SIZE,
        device=model.device,
        pictures=len(asked),
        autocast=nullcontext,
        collate=collate,
        **_GREEDY,
    )
    return [text for _, text in answered], metrics


def accuracy(
    model: LionForCausalLM,
    processor: LionProcessor,
    scene_set: SceneSet,
    kind: str,
    per_scene: int,
    rng: np.random.Generator,
    tags: Sequence[str] | None = None,
) -> float:
    """Return the fraction of correct answers to up to `per_scene` samples of one kind per scene.

    Args:
        tags: one string per scene.
    """
    indices, samples = [], []
    for index in range(len(scene_set)):
        pool = scene_set.samples(index, kind)
        for number in rng.permutation(len(pool))[:per_scene]:
            indices.append(index)
            samples.append(pool[number])
    _, metrics = answer(model, processor, scene_set, indices, samples, tags)
    return metrics["grounding_accuracy" if kind == "rec" else "exact_match"]


def evaluate(model: LionForCausalLM, processor: LionProcessor, scene_set: SceneSet) -> Metrics:
    """Evaluate any checkpoint on scenes: the caption, two questions and two expressions of each scene."""
    rng = np.random.default_rng(0)
    asked = (("caption", 1), ("vqa", 2), ("rec", 2))
    return Metrics(*(accuracy(model, processor, scene_set, *each, rng) for each in asked))
