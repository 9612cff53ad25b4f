"""Rendered scenes, their vision features, and batches of instructions."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from lion_fast.configuration_lion import TASKS
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import IGNORED, TAG_SENTENCE, LionProcessor
from lion_fast.scenes import Sample, Scene, SceneGenerator, corrupt_tags

_CHUNK = 64  # scenes that a worker hands over at once


@dataclass
class SceneSet:
    """Scenes as the vision tower sees them: `pixel_values` float32 [n, 3, H, W], and features once they are known."""

    scenes: list[Scene]
    pixel_values: Tensor
    features: Tensor | None = None  # float16 [n, S, N, vision hidden size]

    def __len__(self) -> int:
        return len(self.scenes)

    def samples(self, index: int, kind: str) -> list[Sample]:
        return [sample for sample in self.scenes[index].samples() if sample.kind == kind]


def render(generator: SceneGenerator, count: int, processor: LionProcessor, label: str) -> SceneSet:
    """The first `count` scenes of a generator, drawn on all cores."""
    subset: Any = Subset(generator, range(count))  # type: ignore[arg-type]
    loader = DataLoader(subset, batch_size=_CHUNK, num_workers=os.cpu_count() or 1, collate_fn=list)
    scenes = []
    with tqdm(total=count, desc=label, unit="scene", leave=False) as bar:
        for chunk in loader:
            scenes += chunk
            bar.update(len(chunk))
    pictures = [scene.image for scene in scenes]
    return SceneSet(scenes, processor.image_processor(pictures, return_tensors="pt")["pixel_values"])


@torch.no_grad()
def compute_features(model: LionForCausalLM, scene_set: SceneSet, batch_size: int = 128) -> None:
    """Fill in `features`: the vision tower is frozen, so every picture passes through it once."""
    parts = [model.get_vision_features(pixels).half() for pixels in scene_set.pixel_values.split(batch_size)]
    scene_set.features = torch.cat(parts)


def encode(
    processor: LionProcessor, samples: Sequence[Sample], tags: Sequence[str] | None = None, with_labels: bool = True
) -> dict[str, Tensor]:
    """The text part of a batch, as `LionProcessor` makes it, for pictures that are already features."""
    questions = [sample.text for sample in samples]
    prompts = questions
    if tags is not None:
        token = processor.soft_prompt_token
        hints = [TAG_SENTENCE.format(soft_prompt=token, tags=listed) if listed else "" for listed in tags]
        prompts = [hint + question for hint, question in zip(hints, questions, strict=True)]
    prompt = processor.tokenizer(prompts, padding=True, return_tensors="pt")
    question = processor.qformer_tokenizer(questions, padding=True, return_tensors="pt")
    batch = {
        "input_ids": prompt["input_ids"],
        "attention_mask": prompt["attention_mask"],
        "qformer_input_ids": question["input_ids"],
        "qformer_attention_mask": question["attention_mask"],
        "task_ids": torch.tensor([TASKS.index(sample.task) for sample in samples]),
    }
    if with_labels:
        answers = processor.tokenizer([sample.answer for sample in samples], padding=True, return_tensors="pt")
        batch["labels"] = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, IGNORED)
    return batch


def training_batches(
    processor: LionProcessor,
    scene_set: SceneSet,
    kinds: Sequence[str],
    batch_size: int,
    rng: np.random.Generator,
    tag_rate: float = 0.2,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of one kind of instruction each, `kinds` in turn, so that lengths within a batch are alike.

    A share `tag_rate` of the batches carries the tags of an imperfect tagger (see `scenes.corrupt_tags`).
    """
    pools = {kind: [scene_set.samples(i, kind) for i in range(len(scene_set))] for kind in set(kinds)}
    while True:
        for kind in kinds:
            scenes = rng.integers(len(scene_set), size=batch_size)
            samples = [pools[kind][i][rng.integers(len(pools[kind][i]))] for i in scenes]
            tags = None
            if rng.random() < tag_rate:
                tags = [", ".join(corrupt_tags(scene_set.scenes[i].tags, rng)) for i in scenes]
            batch = encode(processor, samples, tags)
            assert scene_set.features is not None
            yield {**batch, "vision_features": scene_set.features[torch.from_numpy(scenes)].float()}
