"""Captions, answers and boxes on scenes that no training has seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from lion_fast.io.boxes import iou, parse_boxes
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import TAG_SENTENCE, LionProcessor
from lion_fast.quickstart.data import SceneSet, encode
from lion_fast.scenes import Sample

_GREEDY = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 48}


@dataclass(frozen=True)
class Metrics:
    """Shares between 0 and 1."""

    caption_exact_match: float
    question_accuracy: float
    grounding_accuracy: float  # boxes with IoU >= 0.5; what is no box counts as wrong

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.inference_mode()
def answer(
    model: LionForCausalLM,
    processor: LionProcessor,
    scene_set: SceneSet,
    indices: Sequence[int],
    samples: Sequence[Sample],
    batch_size: int = 128,
    tags: Sequence[str] | None = None,
    tag_sentence: str = TAG_SENTENCE,
) -> list[str]:
    """The model's greedy answers to `samples`, each about the scene of its index; `tags` are one string per scene."""
    model.eval()
    answers = []
    for start in range(0, len(samples), batch_size):
        chosen = list(indices[start : start + batch_size])
        told = None if tags is None else [tags[i] for i in chosen]
        asked = samples[start : start + batch_size]
        batch = encode(processor, asked, told, with_labels=False, tag_sentence=tag_sentence)
        if scene_set.features is None:
            batch["pixel_values"] = scene_set.pixel_values(chosen)
        else:
            # A model that reads the last layer alone takes it out of all.
            batch["vision_features"] = scene_set.features[chosen, : len(model.config.feature_layers)].float()
        ids = model.generate(**batch, **_GREEDY)
        answers += processor.batch_decode(ids, skip_special_tokens=True)
    return answers


def evaluate(model: LionForCausalLM, processor: LionProcessor, scene_set: SceneSet) -> Metrics:
    """Measure any checkpoint on scenes: per scene its caption, two of its questions and two of its expressions."""
    rng = np.random.default_rng(0)

    def ask(kind: str, per_scene: int) -> list[tuple[Sample, str]]:
        indices, samples = choose(scene_set, kind, per_scene, rng)
        return list(zip(samples, answer(model, processor, scene_set, indices, samples), strict=True))

    captions, questions, places = ask("caption", 1), ask("vqa", 2), ask("rec", 2)
    return Metrics(
        float(np.mean([got == sample.answer for sample, got in captions])),
        float(np.mean([got == sample.answer for sample, got in questions])),
        float(np.mean([is_located(sample, got) for sample, got in places])),
    )


def choose(scene_set: SceneSet, kind: str, per_scene: int, rng: np.random.Generator) -> tuple[list[int], list[Sample]]:
    """Up to `per_scene` samples of a kind of every scene, and the scenes' indices."""
    indices, samples = [], []
    for index in range(len(scene_set)):
        pool = scene_set.samples(index, kind)
        for number in rng.permutation(len(pool))[:per_scene]:
            indices.append(index)
            samples.append(pool[number])
    return indices, samples


def is_located(sample: Sample, got: str) -> bool:
    """Whether the first box in an answer overlaps the sample's by at least a half."""
    boxes = parse_boxes(got)
    assert sample.box is not None
    return bool(boxes) and iou(boxes[0], sample.box) >= 0.5
