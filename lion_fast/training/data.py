"""Samples of a recipe's data, and the model's batches.

A sample is a dict: `image` (anything that `io.images.load_image` reads), `task`, `question`, `answer`, and optionally
`tags` (a list of strings or None) and `place` (its location in the source, for messages). The order of samples and
their random numbers depend only on the seed and the position in the run (`lion_fast.data.order`).
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lion_fast.data import JsonlDataset, PictureTagger, RandomCrop, RandomHorizontalFlip, ShardDataset
from lion_fast.data.dataset import EpochDataset, SampleDataset, Tagger, Transform
from lion_fast.data.order import POSITION, TrainingOrder, epoch_order, sample_of
from lion_fast.data.records import Record
from lion_fast.io.reading import shown
from lion_fast.processing_lion import LionProcessor
from lion_fast.scenes import SceneGenerator
from lion_fast.tagging.loading import load_tagger
from lion_fast.training.recipe import SCENES, Augmentation, Data, Recipe, RecipeError

Sample = Mapping[str, Any]
SAMPLE_IDS = "sample_ids"
_SCENES = re.compile(rf"{SCENES}([0-9]{{1,100}}):([0-9]{{1,100}})")
_MAX_SCENES = 10_000_000  # the order of an epoch takes 100 bytes for each


class LionCollator:
    """Collator that turns samples into the inputs of `LionForCausalLM` with the processor.

    Samples with a position (from `TrainingData`) also give `sample_ids`, a list of strings, and `position`, the
    position of the first sample. `LionTrainer` uses the two for reports and seeds, and removes them before the model's
    call.
    """

    def __init__(self, processor: LionProcessor):
        self.processor = processor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch: dict[str, Any] = self.processor(
            images=[sample["image"] for sample in samples],
            text=[sample["question"] for sample in samples],
            tags=[sample.get("tags") for sample in samples],
            task=[sample["task"] for sample in samples],
            text_target=[sample["answer"] for sample in samples],
            return_tensors="pt",
        ).data
        if POSITION in samples[0]:
            batch[SAMPLE_IDS] = [str(sample["id"]) for sample in samples]
            batch[POSITION] = samples[0][POSITION]
        return batch


class SceneSamples(EpochDataset):
    """`count` samples of one task, each from a different generated scene (`lion_fast.scenes`)."""

    def __init__(self, task: str, seed: int, count: int, transforms: Sequence[Transform] = ()):
        self.task = task
        self.count = count
        self.transforms = tuple(transforms)
        self._scenes = SceneGenerator(seed, num_objects=(1, 2))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0..{self.count - 1}, got {index}")
        scene = self._scenes[index]
        own = [sample for sample in scene.samples() if sample.task == self.task]
        chosen = own[np.random.default_rng([self._scenes.seed, index]).integers(len(own))]
        sample: dict[str, Any] = {
            "image": scene.image,
            "task": chosen.task,
            "question": chosen.text,
            "answer": chosen.answer,
            "tags": list(scene.tags),
            "boxes": [] if chosen.box is None else [list(chosen.box)],
            "place": f"scenes:{self._scenes.seed}:{self.count}:{index}",
        }
        rng = np.random.default_rng([self._scenes.seed, epoch, index])
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample


class TaskSamples(EpochDataset):
    """Samples of one task, concatenated from several sources.

    A sample without a `place` gets one, "source:number". The order of an epoch interleaves the sources at random and
    keeps the order of each source: every sample occurs once, and shards are read a few at a time.

    Raises:
        RecipeError: a sample has another task.
    """

    def __init__(self, task: str, sources: Mapping[str, Dataset]):
        self.task = task
        self.sources = dict(sources)
        self._sizes = [len(source) for source in self.sources.values()]  # type: ignore[arg-type]
        self._starts = np.cumsum([0, *self._sizes])
        lengths = [getattr(source, "lengths", None) for source in self.sources.values()]
        if all(length is not None for length in lengths):
            self.lengths = np.concatenate(lengths)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __str__(self) -> str:
        return ", ".join(self.sources)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        order = np.random.default_rng([seed, epoch]).permutation(np.repeat(np.arange(len(self._sizes)), self._sizes))
        for number, source in enumerate(self.sources.values()):
            own = epoch_order(source, int(np.random.SeedSequence([seed, number]).generate_state(1)[0]), epoch)
            order[order == number] = -1 - (own + self._starts[number])  # negative, so never equal to a later `number`
        return -1 - order

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        source_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        name, source = list(self.sources.items())[source_index]
        number = index - int(self._starts[source_index])
        sample: Any = sample_of(source, epoch, number)
        if sample["task"] != self.task:
            raise RecipeError(
                f"data: expected samples of {self.task}, got {sample['task']!r} as sample {number} of {name}"
            )
        return {"place": f"{name}:{number}", **sample}

    @property
    def left_out(self) -> tuple[int, int]:
        """Numbers of skipped lines, and of samples whose image has been unreadable so far, over all sources."""
        sources = self.sources.values()
        return tuple(sum(getattr(s, name, 0) for s in sources) for name in ("num_bad_lines", "num_bad_images"))  # type: ignore[return-value]


def open_training_data(data: Data, seed: int) -> dict[str, TaskSamples]:
    """Open a recipe's training samples by task, with its augmentation and tagger.

    Args:
        data: section of the recipe.
        seed: seed of the augmentation.

    Raises:
        RecipeError: a source is not a JSONL file, a directory of shards or `scenes:SEED:COUNT`.
        DataError: a line is not a valid record, unless `data.skip_bad`.
        CheckpointError: `data.tagger` cannot be loaded.
        OSError: a file cannot be opened.
    """
    return _open_sources("train", data, seed, transforms_of(data.augmentation))


def open_evaluation_data(data: Data) -> dict[str, TaskSamples]:
    """Open a recipe's evaluation samples by task, with its tagger and without augmentation.

    Raises:
        RecipeError, DataError, CheckpointError, OSError: as for `open_training_data`.
    """
    return _open_sources("evaluate", data, 0, [])


def hold_to(processor: LionProcessor, samples: Mapping[str, Dataset]) -> None:
    """Let files and shards give only records that the model's processor takes; others count as unusable samples.

    Which token is the soft prompt's, for example, depends on the model.
    """
    for task_samples in samples.values():
        for source in task_samples.sources.values() if isinstance(task_samples, TaskSamples) else ():
            if isinstance(source, SampleDataset):
                source.accepts = partial(_process, processor)


def training_order(recipe: Recipe, samples: Mapping[str, Dataset]) -> TrainingOrder:
    """Return the keys of all samples of the run.

    Args:
        recipe: `data.shares` gives the relative number of turns of each task.
        samples: task -> dataset with a length.

    Raises:
        RecipeError: a dataset is empty, or has no `lengths` with `data.group_by_length`.
    """
    by_task = {
        task: dataset if isinstance(dataset, TaskSamples) else TaskSamples(task, {task: dataset})
        for task, dataset in samples.items()
    }
    try:
        return TrainingOrder(
            by_task,
            [getattr(recipe.data.shares, task) for task in samples],
            steps=recipe.steps,
            batch_size=recipe.batch.size,
            mix=recipe.data.mix,
            shuffle=recipe.data.shuffle,
            group_by_length=recipe.data.group_by_length,
            seed=recipe.seed,
        )
    except ValueError as error:
        raise RecipeError(f"data.{error}") from error


def _process(processor: LionProcessor, record: Record) -> None:
    processor(
        images=None,
        text=[record.question],
        tags=[record.tags],
        task=record.task,
        text_target=[record.answer],
        return_tensors=None,
    )


def transforms_of(augmentation: Augmentation) -> list[Transform]:
    """Return the transforms of region-level samples; the transforms also move the boxes."""
    return [RandomHorizontalFlip(augmentation.flip), RandomCrop(augmentation.crop, augmentation.crop_min_scale)]


def _open_sources(part: str, data: Data, seed: int, transforms: list[Transform]) -> dict[str, TaskSamples]:
    # The order is that of `Sources`, not of the model's `TASKS`: it determines the samples of each step, also of a run
    # that is resumed.
    named = {task: names for task, names in vars(getattr(data, part)).items() if names}
    tagger = _load_tagger(data) if named and data.tagger else None
    opened = {}
    for task, names in named.items():
        sources = {}
        for name in names:
            try:
                sources[name] = _open(name, task, data, seed, transforms, tagger)
            except (RecipeError, FileNotFoundError) as error:
                raise RecipeError(f"data.{part}.{task}: {error}") from error
        opened[task] = TaskSamples(task, sources)
    return opened


def _load_tagger(data: Data) -> Tagger:
    """Load the tagger, on the GPU if this process reads the samples; worker processes must not use CUDA."""
    on_gpu = torch.cuda.is_available() and data.workers == 0
    directory = Path(data.tagger or "")
    if not directory.is_dir():
        raise RecipeError(
            f"data.tagger: expected a directory of `lion-fast convert`'s RamTagger, got {shown(data.tagger)}"
        )
    return PictureTagger(load_tagger(directory, "cuda" if on_gpu else "cpu"))


def _open(name: str, task: str, data: Data, seed: int, transforms: list[Transform], tagger: Tagger | None) -> Dataset:
    if name.startswith(SCENES):
        numbers = _SCENES.fullmatch(name)
        if numbers is None or int(numbers[2]) < 1:
            raise RecipeError(f"expected {SCENES}SEED:COUNT with whole numbers, got {shown(name)}")
        if int(numbers[2]) > _MAX_SCENES:
            raise RecipeError(f"expected at most {_MAX_SCENES} scenes, got {shown(name)}")
        return SceneSamples(task, int(numbers[1]), int(numbers[2]), transforms)
    options: Any = {"transforms": transforms, "task": task, "tagger": tagger, "strict": not data.skip_bad, "seed": seed}
    if Path(name).is_dir():
        return ShardDataset(name, **options)
    if not name.endswith(".jsonl"):
        raise RecipeError(
            f"expected a .jsonl file, a directory of `lion-fast data shards` or scenes:SEED:COUNT, got {shown(name)}"
        )
    return JsonlDataset(name, image_root=data.image_root, **options)
