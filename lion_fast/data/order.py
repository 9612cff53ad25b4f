"""The order of a run: which sample stands at which position, from any position on, on any number of processes.

A step's batch is `batch_size` positions in a row; a process takes every `world_size`-th micro-batch of them. What a
position holds follows from the seed alone, so a run that goes on, or goes on with another number of processes, sees
what it would have seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from lion_fast.data.dataset import EpochDataset
from lion_fast.data.seeding import seeded

POSITION = "position"
_STEPS_PER_GROUP = 32


class Key(NamedTuple):
    """A position of a run and what stands there: a data set's name, which pass over it this is, and its sample."""

    position: int
    name: str
    epoch: int
    index: int


def take_turns(shares: Sequence[int]) -> list[int]:
    """One round in which number d has `shares[d]` turns, evenly spread: [2, 1] gives 0, 1, 0.

    Turn k of `share` lies at (k + 1/2) / share of the round; ties go to the earlier number.
    """
    return [d for _, d in sorted(((k + 0.5) / share, d) for d, share in enumerate(shares) for k in range(share))]


class TrainingOrder(Sampler[Key]):
    """The keys of a whole run's samples, for positions 0 to `steps * batch_size` - 1.

    A data set is gone through again and again, each pass in an order of its own (`EpochDataset.epoch_order`), so every
    batch is full and no sample is two passes ahead of another. Data sets take turns by their shares.

    With `group_by_length`, the samples of 32 steps are sorted by the length of their text, cut into batches, and the
    batches shuffled. So little is padded, and the order stays as random, as true to the shares and as local on disk as
    it was, but for 32 steps; where steps are of one data set, they stay so.

    Args:
        samples: name -> data set with a length.
        shares: how often each has its turn, whole numbers in the same order; by default all 1.
        steps: optimizer steps of the run.
        batch_size: samples per step over all processes.
        mix: whether turns change from sample to sample or from step to step.
        shuffle: whether passes are permuted.
        group_by_length: see above; needs data sets that know their `lengths`.
        seed: names the permutations.

    Raises:
        ValueError: for no data set or an empty one, shares that are not one whole number of 1 or more for each, sizes
            below 1, or `group_by_length` without lengths or without `shuffle`.
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
            raise ValueError(f"samples: expected data sets with samples, got {self.sizes or 'none'}")
        if len(shares) != len(self.samples) or not all(isinstance(share, int) and share >= 1 for share in shares):
            raise ValueError(
                f"shares: expected {len(self.samples)} whole numbers of 1 or more, one per data set, got {shares}"
            )
        if steps < 1 or batch_size < 1:
            raise ValueError(f"steps, batch_size: expected 1 or more each, got {steps} and {batch_size}")
        if group_by_length:
            _check_lengths(self.samples, shuffle)
        self.steps = steps
        self.batch_size = batch_size
        self.unit = 1 if mix == "sample" else batch_size  # samples in a turn
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
        group, place = divmod(position, _STEPS_PER_GROUP * self.batch_size)
        if self._group[0] != group:
            self._group = group, self._grouped(group)
        return Key(position, *self._group[1][place])

    def _by_turns(self, position: int) -> tuple[str, int, int]:
        """Name, pass and index."""
        turn, within = divmod(position, self.unit)
        round_, place = divmod(turn, len(self.turns))
        name = self.turns[place]
        turns_before = round_ * self.turns.count(name) + self.turns[:place].count(name)
        epoch, offset = divmod(turns_before * self.unit + within, self.sizes[name])
        return name, epoch, self._permuted(name, epoch, offset)

    def _permuted(self, name: str, epoch: int, offset: int) -> int:
        if not self.shuffle:
            return offset
        if self._permutations.get(name, (None,))[0] != epoch:
            # Of its own seed: data sets of one length would otherwise be shuffled alike.
            seed = int(np.random.SeedSequence([self.seed, *name.encode()]).generate_state(1)[0])
            self._permutations[name] = epoch, epoch_order(self.samples[name], seed, epoch)
        return int(self._permutations[name][1][offset])

    def _grouped(self, group: int) -> list[tuple[str, int, int]]:
        """The keys of 32 steps, sorted by length into batches."""
        size = self.batch_size
        first = group * _STEPS_PER_GROUP
        last = min(first + _STEPS_PER_GROUP, self.steps)
        keys = [self._by_turns(position) for position in range(first * size, last * size)]
        lengths: list[int] = [self.samples[name].lengths[index] for name, _, index in keys]  # type: ignore[attr-defined]
        kinds: dict[str, list[int]] = {}  # steps whose samples may take each other's place
        for step in range(len(keys) // size):
            kinds.setdefault(keys[step * size][0] if self.unit > 1 else "", []).append(step)
        rng = np.random.default_rng([self.seed, group, 1])
        grouped = list(keys)
        for steps in kinds.values():
            places = [place for step in steps for place in range(step * size, (step + 1) * size)]
            places.sort(key=lengths.__getitem__)
            for step, batch in zip(steps, rng.permutation(len(steps)).tolist(), strict=True):
                chosen = places[batch * size : (batch + 1) * size]
                grouped[step * size : (step + 1) * size] = [keys[place] for place in chosen]
        return grouped


def epoch_order(dataset: Dataset, seed: int, epoch: int) -> np.ndarray:
    """All samples of a data set in the order of an epoch, int64 [n]: its own, or a permutation."""
    if isinstance(dataset, EpochDataset):
        return dataset.epoch_order(seed, epoch)
    return np.random.default_rng([seed, epoch]).permutation(len(dataset))  # type: ignore[arg-type]


def sample_of(dataset: Dataset, epoch: int, index: int) -> Any:
    """A sample as an epoch sees it."""
    return dataset[epoch, index] if isinstance(dataset, EpochDataset) else dataset[index]


class ProcessBatches(Sampler[list[Key]]):
    """The micro-batches of one process: every `world_size`-th of the run's, from the one of `rank` on.

    Args:
        order: of the run.
        size: samples in a micro-batch.
        rank, world_size: which process this is, of how many.
        start: step to begin at.

    Raises:
        ValueError: a rank outside of the world, a step beyond the run, or a batch that is no multiple of what all
            processes take at a time.
    """

    def __init__(self, order: TrainingOrder, size: int, *, rank: int = 0, world_size: int = 1, start: int = 0):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} (from world_size), got {rank}")
        if size < 1 or order.batch_size % (size * world_size):
            raise ValueError(
                f"size: expected micro-batches that {world_size} processes can share a step of {order.batch_size} in, "
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
    """Samples by `TrainingOrder`'s keys, each made under random numbers of its own.

    Whatever a data set draws from Python's, NumPy's or PyTorch's global generators follows from the seed and the
    sample's position: the same in any worker, and when a run goes on. Samples come with `position` and an `id`.
    """

    def __init__(self, samples: Mapping[str, Dataset], seed: int):
        self.samples = dict(samples)
        self.seed = seed

    def __len__(self) -> int:
        return sum(map(len, self.samples.values()))  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        with seeded(self.seed, key.position, 0):
            sample = sample_of(self.samples[key.name], key.epoch, key.index)
        # Not the sample's own id: what is reported has to be found again.
        return {**sample, "id": sample.get("place") or f"{key.name}:{key.index}", POSITION: key.position}


def _check_lengths(samples: Mapping[str, Dataset], shuffle: bool) -> None:
    if not shuffle:
        raise ValueError("group_by_length: expected false without shuffle, as it changes the order, got true")
    for name, dataset in samples.items():
        if getattr(dataset, "lengths", None) is None:
            raise ValueError(
                "group_by_length: expected data sets that know the lengths of their texts, files or shards, got "
                f"{name}: {dataset}"
            )
