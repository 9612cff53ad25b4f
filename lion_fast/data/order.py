"""The sample order of a run: the sample at each position, from any position and on any number of processes.

The batch of a step is `batch_size` consecutive positions; a process takes every `world_size`-th micro-batch of them.
The sample at a position depends only on the seed, so a resumed run sees the same samples, also on another number of
processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, Sampler

from lion_fast.data.dataset import EpochDataset
from lion_fast.data.seeding import seeded
from lion_fast.io.images import load_image

POSITION = "position"
_STEPS_PER_GROUP = 32


class Key(NamedTuple):
    """A position of a run and its sample: name of the dataset, epoch of that dataset, and index of the sample."""

    position: int
    name: str
    epoch: int
    index: int


def take_turns(shares: Sequence[int]) -> list[int]:
    """Return one round in which d has `shares[d]` turns, evenly spaced: [2, 1] gives 0, 1, 0.

    Turn k of `share` is at (k + 1/2) / share of the round; the smaller d wins a tie.
    """
    return [d for _, d in sorted(((k + 0.5) / share, d) for d, share in enumerate(shares) for k in range(share))]


class TrainingOrder(Sampler[Key]):
    """Sampler of the keys of a whole run, for positions 0 to `steps * batch_size` - 1.

    Each dataset is repeated, with a new order in each epoch (`EpochDataset.epoch_order`), so every batch is full and no
    sample is two epochs ahead of another. Datasets take turns according to their shares.

    With `group_by_length`, the samples of 32 steps are sorted by the length of their text and cut into batches, and the
    batches are shuffled. Batches then need little padding. Beyond 32 steps, the order stays as random, as true to the
    shares and as local on disk as without grouping. Steps with samples of a single dataset keep that property.

    Args:
        samples: name -> dataset with a length.
        shares: relative number of turns of each dataset, integers in the order of `samples`; all 1 by default.
        steps: optimizer steps of the run.
        batch_size: samples per step over all processes.
        mix: whether datasets alternate between samples or between steps.
        shuffle: whether each epoch is permuted.
        group_by_length: see above; requires datasets with `lengths`.
        seed: seed of the permutations.

    Raises:
        ValueError: no dataset, an empty dataset, `shares` that are not one positive integer per dataset, sizes below 1,
            or `group_by_length` without lengths or without `shuffle`.
    """

    def __init__(
        self,
        samples: Mapping[str, Dataset],
        shares: Sequence[int] | None = None,
        *,
        steps: int,
        batch_size: int,
        mix: Literal["sample", "step"] = "sample",
        shuffle: bool = True,
        group_by_length: bool = False,
        seed: int = 0,
    ):
        self.samples = dict(samples)
        self.sizes = {name: len(dataset) for name, dataset in self.samples.items()}  # type: ignore[arg-type]
        shares = [1] * len(self.samples) if shares is None else list(shares)
        if not self.sizes or min(self.sizes.values()) < 1:
            raise ValueError(f"samples: expected datasets with samples, got {self.sizes or 'none'}")
        if len(shares) != len(self.samples) or not all(isinstance(share, int) and share >= 1 for share in shares):
            raise ValueError(f"shares: expected {len(self.samples)} positive integers, one per dataset, got {shares}")
        if steps < 1 or batch_size < 1:
            raise ValueError(f"steps, batch_size: expected 1 or more each, got {steps} and {batch_size}")
        if group_by_length:
            _check_lengths(self.samples, shuffle)
        self.steps = steps
        self.batch_size = batch_size
        self.unit = 1 if mix == "sample" else batch_size  # samples per turn
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.seed = seed
        names = list(self.samples)
        self.turns = [names[number] for number in take_turns(shares)]
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}
        self._group: tuple[int, list[tuple[str, int, int]]] = (-1, [])

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Key:
        if not 0 <= position < len(self):
            raise IndexError(f"position: expected 0..{len(self) - 1}, got {position}")
        if not self.group_by_length:
            return Key(position, *self._by_turns(position))
        group, offset = divmod(position, _STEPS_PER_GROUP * self.batch_size)
        if self._group[0] != group:
            self._group = group, self._grouped(group)
        return Key(position, *self._group[1][offset])

    def _by_turns(self, position: int) -> tuple[str, int, int]:
        """Return name, epoch and index of the sample at a position, without grouping."""
        turn, within = divmod(position, self.unit)
        round_, turn_in_round = divmod(turn, len(self.turns))
        name = self.turns[turn_in_round]
        turns_before = round_ * self.turns.count(name) + self.turns[:turn_in_round].count(name)
        epoch, offset = divmod(turns_before * self.unit + within, self.sizes[name])
        return name, epoch, self._permuted(name, epoch, offset)

    def _permuted(self, name: str, epoch: int, offset: int) -> int:
        if not self.shuffle:
            return offset
        if self._permutations.get(name, (None,))[0] != epoch:
            # The seed depends on the name, because datasets of equal length would otherwise be shuffled alike.
            seed = int(np.random.SeedSequence([self.seed, *name.encode()]).generate_state(1)[0])
            self._permutations[name] = epoch, epoch_order(self.samples[name], seed, epoch)
        return int(self._permutations[name][1][offset])

    def _grouped(self, group: int) -> list[tuple[str, int, int]]:
        """Return the keys of 32 steps, grouped into batches by length."""
        size = self.batch_size
        first = group * _STEPS_PER_GROUP
        last = min(first + _STEPS_PER_GROUP, self.steps)
        keys = [self._by_turns(position) for position in range(first * size, last * size)]
        lengths: list[int] = [self.samples[name].lengths[index] for name, _, index in keys]  # type: ignore[attr-defined]
        kinds: dict[str, list[int]] = {}  # steps that may exchange samples
        for step in range(len(keys) // size):
            kinds.setdefault(keys[step * size][0] if self.unit > 1 else "", []).append(step)
        rng = np.random.default_rng([self.seed, group, 1])
        grouped = list(keys)
        for steps in kinds.values():
            positions = [position for step in steps for position in range(step * size, (step + 1) * size)]
            positions.sort(key=lengths.__getitem__)
            for step, batch in zip(steps, rng.permutation(len(steps)).tolist(), strict=True):
                chosen = positions[batch * size : (batch + 1) * size]
                grouped[step * size : (step + 1) * size] = [keys[position] for position in chosen]
        return grouped


def epoch_order(dataset: Dataset, seed: int, epoch: int) -> np.ndarray:
    """Return the indices of a dataset in the order of an epoch, int64 [n]: the dataset's own order or a permutation."""
    if isinstance(dataset, EpochDataset):
        return dataset.epoch_order(seed, epoch)
    return np.random.default_rng([seed, epoch]).permutation(len(dataset))  # type: ignore[arg-type]


def sample_of(dataset: Dataset, epoch: int, index: int) -> Any:
    """Return a sample of an epoch."""
    return dataset[epoch, index] if isinstance(dataset, EpochDataset) else dataset[index]


class ProcessBatches(Sampler[list[Key]]):
    """Batch sampler of one process: every `world_size`-th micro-batch of the run, starting with number `rank`.

    Args:
        order: sample order of the run.
        size: samples per micro-batch.
        rank, world_size: rank of this process and number of processes.
        start: step to start at.

    Raises:
        ValueError: `rank` is not below `world_size`, `start` is beyond the run, or the run's `batch_size` is not a
            multiple of `size * world_size`.
    """

    def __init__(self, order: TrainingOrder, size: int, *, rank: int = 0, world_size: int = 1, start: int = 0):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} (from world_size), got {rank}")
        if size < 1 or order.batch_size % (size * world_size):
            raise ValueError(
                f"size: expected a size that, times {world_size} processes, divides the batch of {order.batch_size}, "
                f"got {size}"
            )
        if not 0 <= start <= order.steps:
            raise ValueError(f"start: expected a step of 0 to {order.steps}, got {start}")
        self.order, self.size = order, size
        self.numbers = range(start * order.batch_size // size + rank, len(order) // size, world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for number in self.numbers:
            yield [self.order[position] for position in range(number * self.size, (number + 1) * self.size)]

    def __len__(self) -> int:
        return len(self.numbers)


class TrainingData(Dataset):
    """Dataset indexed by the keys of `TrainingOrder`, with random numbers seeded per sample.

    Numbers that a dataset draws from Python's, NumPy's or PyTorch's global generators depend only on the seed and the
    sample's position: they are the same in any worker and in a resumed run. Samples get `position` and an `id`.

    Args:
        reduce: resizes each sample's image as soon as it is read, so that one image of a batch is held at its full
            size; None to keep images as they are.
    """

    def __init__(
        self, samples: Mapping[str, Dataset], seed: int, reduce: Callable[[Image.Image], Image.Image] | None = None
    ):
        self.samples = dict(samples)
        self.seed = seed
        self.reduce = reduce

    def __len__(self) -> int:
        return sum(map(len, self.samples.values()))  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        with seeded(self.seed, key.position, 0):
            sample = sample_of(self.samples[key.name], key.epoch, key.index)
        if self.reduce is not None:
            image = load_image(sample["image"], f"{sample.get('place') or key.name}: image")
            sample = {**sample, "image": self.reduce(image)}
        # The location rather than the sample's own id, so that a reported sample can be found.
        return {**sample, "id": sample.get("place") or f"{key.name}:{key.index}", POSITION: key.position}


def _check_lengths(samples: Mapping[str, Dataset], shuffle: bool) -> None:
    if not shuffle:
        raise ValueError(
            "group_by_length: expected false without shuffle, because grouping changes the order, got true"
        )
    for name, dataset in samples.items():
        if getattr(dataset, "lengths", None) is None:
            raise ValueError(
                f"group_by_length: expected datasets with known text lengths (files or shards), got {name}: {dataset}"
            )
