"""Batches of samples of alike length, the same on any number of processes, from any position on."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from lion_fast.data.dataset import SampleDataset
from lion_fast.data.mixture import MixtureDataset

_BATCHES_PER_GROUP = 32


class LengthGroupedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for `DataLoader(batch_sampler=...)`, made of samples of alike length.

    An epoch's order (`dataset.epoch_order`) is cut into groups of 32 batches; within a group samples are sorted by the
    length of their text and batches are shuffled. So little is padded, and the order stays as random, as true to a
    mixture's ratio and as local on disk as the data set gave it, but for 32 batches.

    All depends on seed, epoch and global batch size alone. Of each global batch, rank r takes every `world_size`-th
    sample from r on: one process with `batch_size` 16 and two with 8 see the same global batches.

    Args:
        dataset: gives order and lengths.
        batch_size: samples in a batch of one process.
        seed: of the order.
        rank, world_size: which process this is, of how many.
        drop_last: leave out the last global batch where it is not full; which samples that are changes by epoch.
            Otherwise the last batches may be smaller, and differ by one between ranks; up to `world_size` - 1 samples
            are still left out where there is not one for each rank.

    Attributes:
        epoch, start: where iteration begins; set by `set_epoch`.

    Raises:
        ValueError: for sizes below 1, a rank outside of the world, or fewer samples than one batch needs.
    """

    def __init__(
        self,
        dataset: SampleDataset | MixtureDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ):
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size, world_size: expected 1 or more each, got {batch_size} and {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} (from world_size), got {rank}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = self.start = 0
        num_samples = len(dataset.epoch_order(seed, 0))
        whole, rest = divmod(num_samples, batch_size * world_size)
        self.num_batches = whole + (not drop_last and rest >= world_size)
        if self.num_batches == 0:
            raise ValueError(
                f"batch_size: expected at most {num_samples} samples in a batch of all processes together, "
                f"got {batch_size} x {world_size}"
            )

    def __len__(self) -> int:
        """Batches of an epoch, wherever iteration begins."""
        return self.num_batches

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration begin at batch `start` of an epoch.

        Raises:
            ValueError: for a negative epoch, or a batch that the epoch does not have.
        """
        if epoch < 0 or not 0 <= start <= self.num_batches:
            raise ValueError(
                f"epoch, start: expected 0 or more, and 0 to {self.num_batches} batches, got {epoch} and {start}"
            )
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The batches of `epoch` from `start` on; afterwards the next epoch is set, from its first batch."""
        epoch, start = self.epoch, self.start
        for batch in self.global_batches(epoch)[start:]:
            yield [(epoch, int(index)) for index in batch[self.rank :: self.world_size]]
        if (self.epoch, self.start) == (epoch, start):
            self.set_epoch(epoch + 1)

    def global_batches(self, epoch: int) -> list[np.ndarray]:
        """Every batch of an epoch, of all processes together."""
        order = self.dataset.epoch_order(self.seed, epoch)
        rng = np.random.default_rng([self.seed, epoch, 1])
        size = self.batch_size * self.world_size
        whole = len(order) // size * size
        batches: list[np.ndarray] = []
        for begin in range(0, whole, size * _BATCHES_PER_GROUP):
            group = order[begin : min(begin + size * _BATCHES_PER_GROUP, whole)]
            by_length = group[np.argsort(self.dataset.lengths[group], kind="stable")]
            batches += list(rng.permutation(by_length.reshape(-1, size)))
        if len(batches) < self.num_batches:
            batches.append(order[whole:])
        return batches
