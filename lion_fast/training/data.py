"""Samples in the order of training, and the batches that the model reads.

A sample is a dict: `image` (anything `lion_fast.images.load_image` reads), `task`, `question`, `answer`, and optionally
`tags` (a list of strings or None) and `id`. Its order and its random numbers follow from the seed and its position in
the run alone, not from how many processes or workers there are, nor from where a run was stopped.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Sampler

from lion_fast.data import JsonlDataset
from lion_fast.data.mixture import take_turns
from lion_fast.processing_lion import LionProcessor
from lion_fast.scenes import SceneGenerator
from lion_fast.training.recipe import RecipeError, Sources

Sample = Mapping[str, Any]
SAMPLE_IDS, POSITION = "sample_ids", "position"


class LionCollator:
    """Samples to the tensors of `LionForCausalLM`, by the processor.

    Samples that have a position (of a `TrainingData`) also make `sample_ids`, a list of strings, and `position`, that
    of the first one: what `LionTrainer` reports and seeds by, and takes out before the model sees the batch.
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


class SceneSamples(Dataset):
    """`count` samples of one task, each about a generated scene of its own (`lion_fast.scenes`)."""

    def __init__(self, task: str, seed: int, count: int):
        self.task = task
        self.count = count
        self._scenes = SceneGenerator(seed, num_objects=(1, 2))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0..{self.count - 1}, got {index}")
        scene = self._scenes[index]
        own = [sample for sample in scene.samples() if sample.task == self.task]
        sample = own[np.random.default_rng([self._scenes.seed, index]).integers(len(own))]
        return {
            "image": scene.image,
            "task": sample.task,
            "question": sample.text,
            "answer": sample.answer,
            "tags": list(scene.tags),
        }


class TaskSamples(Dataset):
    """The samples of one task from several sources, each with an `id`: its own, or source and number.

    Raises:
        RecipeError: a sample is of another task.
    """

    def __init__(self, task: str, sources: Mapping[str, Dataset]):
        self.task = task
        self._names = list(sources)
        self._samples = ConcatDataset(sources.values())

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sizes = self._samples.cumulative_sizes
        source = int(np.searchsorted(sizes, index, side="right"))
        number = index - (sizes[source - 1] if source else 0)
        sample: Any = self._samples[index]
        if sample["task"] != self.task:
            raise RecipeError(
                f"data: expected samples of {self.task}, got {sample['task']!r} as sample {number} of "
                f"{self._names[source]}"
            )
        return {"id": f"{self._names[source]}:{number}", **sample}


def open_sources(sources: Sources, image_root: str | None) -> dict[str, TaskSamples]:
    """The samples of every task that has sources.

    Raises:
        RecipeError: for a source that is neither a JSONL file nor `scenes:SEED:COUNT`.
        OSError: a file cannot be opened.
    """
    opened = {}
    for task in ("image_level", "region_level"):
        names = getattr(sources, task)
        if names:
            opened[task] = TaskSamples(task, {name: _open(name, task, image_root) for name in names})
    return opened


def _open(name: str, task: str, image_root: str | None) -> Dataset:
    if name.startswith("scenes:"):
        numbers = name.split(":")[1:]
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or int(numbers[1]) < 1:
            raise RecipeError(f"data: expected scenes:SEED:COUNT with whole numbers, got {name!r}")
        return SceneSamples(task, int(numbers[0]), int(numbers[1]))
    if not name.endswith(".jsonl"):
        raise RecipeError(f"data: expected a .jsonl file or scenes:SEED:COUNT, got {name!r}")
    return JsonlDataset(name, image_root=image_root, task=task)


class TrainingOrder(Sampler[tuple[int, str, int]]):
    """The samples of a whole run: (position, task, index) for position 0, 1, ... up to `steps * batch_size`.

    A task's samples are gone through again and again, each pass in an order of its own, so every batch is full. Tasks
    take turns by their shares. Any position can be asked for at once; nothing depends on what was asked before.

    Args:
        sizes: number of samples of each task.
        shares: how often each task has its turn, in the same order.
        steps: optimizer steps of the run.
        batch_size: samples per step over all processes.
        mix: whether turns change from sample to sample or from step to step.
        shuffle: whether passes are permuted.
        seed: names the permutations.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Sequence[int],
        *,
        steps: int,
        batch_size: int,
        mix: Literal["sample", "step"],
        shuffle: bool,
        seed: int,
    ):
        self.sizes = dict(sizes)
        self.steps = steps
        self.batch_size = batch_size
        self.unit = 1 if mix == "sample" else batch_size  # samples in a turn
        self.shuffle = shuffle
        self.seed = seed
        tasks = [task for task, _ in zip(self.sizes, shares, strict=True)]
        self.turns = [tasks[number] for number in take_turns(shares)]
        self._permutations: dict[str, tuple[int, torch.Tensor]] = {}

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, str, int]]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> tuple[int, str, int]:
        turn, within = divmod(position, self.unit)
        round_, place = divmod(turn, len(self.turns))
        task = self.turns[place]
        turns_before = round_ * self.turns.count(task) + self.turns[:place].count(task)
        pass_, offset = divmod(turns_before * self.unit + within, self.sizes[task])
        return position, task, self._permuted(task, pass_, offset)

    def _permuted(self, task: str, pass_: int, offset: int) -> int:
        if not self.shuffle:
            return offset
        if self._permutations.get(task, (None,))[0] != pass_:
            permutation = np.random.default_rng([self.seed, *task.encode(), pass_]).permutation(self.sizes[task])
            self._permutations[task] = pass_, torch.from_numpy(permutation)
        return int(self._permutations[task][1][offset])


class TrainingData(Dataset):
    """Samples by `TrainingOrder`'s keys, each made under random numbers of its own.

    Whatever a data set draws from Python's, NumPy's or PyTorch's global generators follows from the seed and the
    sample's position: the same in any worker, and when a run goes on.
    """

    def __init__(self, samples: Mapping[str, Dataset], seed: int):
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return sum(map(len, self.samples.values()))  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, str, int]) -> dict[str, Any]:
        position, task, index = key
        seed_everything(self.seed, position, 0)
        return {"id": f"{task}:{index}", **self.samples[task][index], POSITION: position}


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators by whole numbers of 0 or more."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - the generator that augmentations of other people draw from
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
