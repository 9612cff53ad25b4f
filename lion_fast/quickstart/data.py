"""Rendered scenes, their vision features, and batches of instructions."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from lion_fast.data.loader import start_method
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.quickstart.models import IMAGE_SIZE
from lion_fast.scenes import Sample, Scene, SceneGenerator, corrupt_tags

_CHUNK = 64  # scenes that a worker hands over at once


@dataclass
class SceneSet:
    """Scenes as the vision tower sees them, and its features once they are known."""

    scenes: list[Scene]
    mean: Tensor  # [3, 1, 1], of the processor's normalisation
    std: Tensor
    features: Tensor | None = None  # float16 [n, S, N, vision hidden size]

    def __len__(self) -> int:
        return len(self.scenes)

    def pixel_values(self, indices: Iterable[int]) -> Tensor:
        """float32 [len(indices), 3, H, W], as the processor makes them of pictures that have its size already."""
        pictures = np.stack([np.asarray(self.scenes[i].image) for i in indices])
        return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - self.mean) / self.std

    @cached_property
    def _samples(self) -> list[dict[str, list[Sample]]]:
        grouped: list[dict[str, list[Sample]]] = [defaultdict(list) for _ in self.scenes]
        for by_kind, scene in zip(grouped, self.scenes, strict=True):
            for sample in scene.samples():
                by_kind[sample.kind].append(sample)
        return grouped

    def samples(self, index: int, kind: str) -> list[Sample]:
        return self._samples[index][kind]


def easy_scenes(seed: int, image_size: int = IMAGE_SIZE, text_rate: float = 0.1) -> SceneGenerator:
    """Scenes that a model of a few hundred thousand parameters can learn in minutes: one or two objects, few signs.

    Training shows more signs than evaluation, so that six words are learnt from fewer scenes.
    """
    return SceneGenerator(seed, image_size, num_objects=(1, 2), text_rate=text_rate)


def render(generator: SceneGenerator, count: int, processor: LionProcessor, label: str) -> SceneSet:
    """The first `count` scenes of a generator, drawn on all cores.

    Raises:
        ValueError: the generator draws another size than the processor reads.
    """
    image_processor: Any = processor.image_processor
    if generator.image_size != image_processor.size["height"]:
        raise ValueError(
            f"generator: expected pictures of {image_processor.size['height']} pixels (from processor), "
            f"got {generator.image_size}"
        )
    subset: Any = Subset(generator, range(count))  # type: ignore[arg-type]
    loader = DataLoader(
        subset,
        batch_size=_CHUNK,
        num_workers=os.cpu_count() or 1,
        multiprocessing_context=start_method(),
        collate_fn=list,
    )
    scenes = []
    with tqdm(total=count, desc=label, unit="scene", leave=False) as bar:
        for chunk in loader:
            scenes += chunk
            bar.update(len(chunk))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return SceneSet(scenes, mean, std)


@torch.no_grad()
def compute_features(model: LionForCausalLM, scene_set: SceneSet, batch_size: int = 128) -> None:
    """Fill in `features`: the vision tower is frozen, so every picture passes through it once."""
    batches = (range(len(scene_set))[start : start + batch_size] for start in range(0, len(scene_set), batch_size))
    scene_set.features = torch.cat([model.get_vision_features(scene_set.pixel_values(b)).half() for b in batches])


def encode(processor: LionProcessor, samples: Sequence[Sample], tags: Sequence[str] | None = None) -> dict[str, Tensor]:
    """What the processor makes of samples, for images that are features already."""
    return processor(
        images=None,
        text=[sample.text for sample in samples],
        tags=tags,
        task=[sample.task for sample in samples],
        text_target=[sample.answer for sample in samples],
    ).data


def scenes_with_a_choice(scene_set: SceneSet) -> np.ndarray:
    """Indices of scenes with several objects: with one, its place is found without reading the expression."""
    return np.array([i for i, scene in enumerate(scene_set.scenes) if len(scene.objects) > 1])


def pick(samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
    return samples[int(rng.integers(len(samples)))]


def training_batches(
    processor: LionProcessor,
    scene_set: SceneSet,
    kinds: Sequence[str],
    batch_size: int,
    rng: np.random.Generator,
    tag_rate: float = 0.2,
    tags: Sequence[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of one kind of instruction each, `kinds` in turn, so that lengths within a batch are alike.

    Places are asked for where there is a choice (see `scenes_with_a_choice`). A share `tag_rate` of the batches carries
    tags: those given, one string per scene, or an imperfect tagger's (see `scenes.corrupt_tags`).
    """
    everything, choices = np.arange(len(scene_set)), scenes_with_a_choice(scene_set)
    while True:
        for kind in kinds:
            scenes = rng.choice(choices if kind == "rec" else everything, size=batch_size)
            samples = [pick(scene_set.samples(i, kind), rng) for i in scenes]
            told = None
            if rng.random() < tag_rate:
                if tags is None:
                    told = [", ".join(corrupt_tags(scene_set.scenes[i].tags, rng)) for i in scenes]
                else:
                    told = [tags[int(i)] for i in scenes]
            batch = encode(processor, samples, told)
            assert scene_set.features is not None
            yield {**batch, "vision_features": scene_set.features[torch.from_numpy(scenes)].float()}
