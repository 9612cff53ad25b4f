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

_CHUNK = 64  # scenes per item of a worker


@dataclass
class SceneSet:
    """Scenes with the processor's normalisation, and the cached vision features after `compute_features`."""

    scenes: list[Scene]
    mean: Tensor  # [3, 1, 1], mean and std of the processor's normalisation
    std: Tensor
    features: Tensor | None = None  # float16 [n, S, N, vision hidden size]

    def __len__(self) -> int:
        return len(self.scenes)

    def pixel_values(self, indices: Iterable[int]) -> Tensor:
        """Return float32 [len(indices), 3, H, W], equal to the processor's output for images of its size."""
        images = np.stack([np.asarray(self.scenes[i].image) for i in indices])
        return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - self.mean) / self.std

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
    """Return scenes that a model of a few hundred thousand parameters learns in minutes: 1 or 2 objects, few signs.

    Training uses more signs than evaluation, so that the six words are learnt from fewer scenes.
    """
    return SceneGenerator(seed, image_size, num_objects=(1, 2), text_rate=text_rate)


def render(generator: SceneGenerator, count: int, processor: LionProcessor, label: str) -> SceneSet:
    """Draw the first `count` scenes of a generator on all cores.

    Raises:
        ValueError: the generator's image size differs from the processor's.
    """
    image_processor: Any = processor.image_processor
    if generator.image_size != image_processor.size["height"]:
        raise ValueError(
            f"generator: expected images of {image_processor.size['height']} pixels (from processor), "
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
    """Compute `features` once for every image, because the vision tower is frozen."""
    batches = (range(len(scene_set))[start : start + batch_size] for start in range(0, len(scene_set), batch_size))
    scene_set.features = torch.cat([model.get_vision_features(scene_set.pixel_values(b)).half() for b in batches])


def encode(processor: LionProcessor, samples: Sequence[Sample], tags: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Encode samples with the processor, without images; their features are cached."""
    return processor(
        images=None,
        text=[sample.text for sample in samples],
        tags=tags,
        task=[sample.task for sample in samples],
        text_target=[sample.answer for sample in samples],
    ).data


def scenes_by_turns(
    scene_set: SceneSet, kinds: Sequence[str], batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a kind of instruction and the indices of `batch_size` scenes, forever; the kinds take turns.

    Grounding uses scenes with several objects only: a single object is located without reading the expression.
    """
    everything = np.arange(len(scene_set))
    choices = np.array([i for i, scene in enumerate(scene_set.scenes) if len(scene.objects) > 1])
    while True:
        for kind in kinds:
            yield kind, rng.choice(choices if kind == "rec" else everything, size=batch_size)


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
    """Yield batches forever, each with one kind of instruction, in turn, so that a batch has similar lengths.

    The scenes are those of `scenes_by_turns`. A fraction `tag_rate` of the batches has tags: `tags`, one string per
    scene, or those of an imperfect tagger (see `scenes.corrupt_tags`).
    """
    for kind, scenes in scenes_by_turns(scene_set, kinds, batch_size, rng):
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
