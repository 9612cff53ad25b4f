"""Several data sets as one, in a fixed ratio: image-level to region-level, or any other."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from lion_fast.data.dataset import Sample, SampleDataset


def take_turns(shares: Sequence[int]) -> list[int]:
    """One round in which number d has `shares[d]` turns, evenly spread: [2, 1] gives 0, 1, 0.

    Turn k of `share` lies at (k + 1/2) / share of the round; ties go to the earlier number.
    """
    return [d for _, d in sorted(((k + 0.5) / share, d) for d, share in enumerate(shares) for k in range(share))]


class MixtureDataset(Dataset):
    """Data sets end to end, with an order of each epoch that takes from them in a ratio.

    `mixture[i]` and `mixture[epoch, i]` are the samples of the first data set, then of the second, and so on. The
    order of an epoch (`epoch_order`) takes `ratio[k]` samples of data set k in every `sum(ratio)`, evenly spread: with
    (1, 1), which the published recipe uses for image-level and region-level data, they alternate.

    An epoch is as long as it takes to pass once through the data set that lasts longest at this ratio. The others
    start over, shuffled anew, and go on in the next epoch where they stopped, so all their samples are seen equally
    often in the long run.

    Args:
        datasets: what is mixed.
        ratio: whole numbers, one per data set; by default all 1.

    Raises:
        ValueError: for no data set, or a ratio that is not one whole number of 1 or more for each.
    """

    def __init__(self, datasets: Sequence[SampleDataset], ratio: Sequence[int] | None = None):
        self.datasets = list(datasets)
        self.ratio = [1] * len(self.datasets) if ratio is None else list(ratio)
        if not self.datasets:
            raise ValueError("datasets: expected at least one, got none")
        whole = all(isinstance(share, int) and share >= 1 for share in self.ratio)
        if len(self.ratio) != len(self.datasets) or not whole:
            raise ValueError(
                f"ratio: expected {len(self.datasets)} whole numbers of 1 or more, one per data set, got {ratio}"
            )
        self._starts = np.cumsum([0, *map(len, self.datasets)])
        self.tasks = np.concatenate([dataset.tasks for dataset in self.datasets])
        self.lengths = np.concatenate([dataset.lengths for dataset in self.datasets])
        self._pattern = np.array(take_turns(self.ratio))
        self._periods = max(-(-len(d) // share) for d, share in zip(self.datasets, self.ratio, strict=True))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_bad_images(self) -> int:
        return sum(dataset.num_bad_images for dataset in self.datasets)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        dataset, local = self._find(index)
        return dataset[epoch, local]

    def place(self, index: int) -> str:
        dataset, local = self._find(index)
        return dataset.place(local)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Positions in the mixture in the order of an epoch, int64 [periods * sum(ratio)]."""
        order = np.empty((self._periods, len(self._pattern)), np.int64)
        for d, (dataset, share) in enumerate(zip(self.datasets, self.ratio, strict=True)):
            taken = self._periods * share
            first = epoch * taken
            # Passes through a data set are numbered across epochs; each has its own shuffle.
            passes = range(first // len(dataset), (first + taken - 1) // len(dataset) + 1)
            # Of its own seed: data sets of one length would otherwise be shuffled alike.
            own_seed = int(np.random.SeedSequence([seed, d + 1]).generate_state(1)[0])
            shuffled = np.concatenate([dataset.epoch_order(own_seed, number) for number in passes])
            offset = first - passes[0] * len(dataset)
            order[:, self._pattern == d] = self._starts[d] + shuffled[offset : offset + taken].reshape(-1, share)
        return order.ravel()

    def _find(self, index: int) -> tuple[SampleDataset, int]:
        index = range(len(self))[index]
        d = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.datasets[d], index - int(self._starts[d])
