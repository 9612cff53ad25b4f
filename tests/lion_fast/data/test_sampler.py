"""Order: mixtures, batches of alike length, several processes, resumption."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lion_fast.data import JsonlDataset, LengthGroupedBatchSampler, MixtureDataset, make_loader

REGION = {"task": "region_level"}


@pytest.fixture
def make_dataset(write_lines):
    """Data sets of `count` records whose questions have random lengths."""

    def make(count: int, task: str = "image_level", name: str = "train.jsonl") -> JsonlDataset:
        lengths = np.random.default_rng(count).integers(1, 100, count)
        return JsonlDataset(
            write_lines(
                *[{"task": task, "question": "q" * int(n), "id": str(i)} for i, n in enumerate(lengths)], name=name
            )
        )

    return make


@pytest.mark.parametrize(
    ("sizes", "ratio"), [((7, 5), (1, 1)), ((3, 20), (2, 1)), ((4, 9, 6), (1, 3, 2)), ((5,), (1,))]
)
def test_an_epoch_of_a_mixture_keeps_the_ratio_and_sees_all(make_dataset, sizes, ratio) -> None:
    datasets = [make_dataset(size, name=f"{i}.jsonl") for i, size in enumerate(sizes)]
    mixture = MixtureDataset(datasets, ratio)
    assert len(mixture) == sum(sizes)
    starts = np.cumsum([0, *sizes])
    seen: Counter = Counter()
    for epoch in range(6):
        order = mixture.epoch_order(1, epoch)
        source = np.searchsorted(starts, order, side="right") - 1
        for begin in range(0, len(order), sum(ratio)):
            assert np.bincount(source[begin : begin + sum(ratio)], minlength=len(ratio)).tolist() == list(ratio)
        seen.update(order.tolist())
        # Of every data set no sample is two passes ahead of another, after any number of epochs.
        for first, last in itertools.pairwise(starts):
            counts = [seen[i] for i in range(first, last)]
            assert max(counts) - min(counts) <= 1
    assert min(seen[i] for i in range(len(mixture))) >= 6 if len(sizes) == 1 else len(seen) == len(mixture)
    assert not np.array_equal(mixture.epoch_order(1, 0), mixture.epoch_order(1, 1))
    assert not np.array_equal(mixture.epoch_order(1, 0), mixture.epoch_order(2, 0))
    assert np.array_equal(mixture.epoch_order(1, 3), MixtureDataset(datasets, ratio).epoch_order(1, 3))


def test_one_to_one_alternates_and_data_sets_of_one_length_are_shuffled_apart(make_dataset) -> None:
    images, regions = make_dataset(50), make_dataset(50, "region_level", "regions.jsonl")
    order = MixtureDataset([images, regions]).epoch_order(0, 0)
    assert (order[0::2] < 50).all()
    assert (order[1::2] >= 50).all()
    assert (order[0::2] != order[1::2] - 50).mean() > 0.8


def test_a_mixture_s_samples_are_those_of_its_parts(pictures, write_lines) -> None:
    images = JsonlDataset(write_lines({}, {"image": "b.png"}))
    noted = [lambda sample, rng: sample | {"drawn": rng.random()}]
    regions = JsonlDataset(write_lines(REGION, name="regions.jsonl"), transforms=noted)
    mixture = MixtureDataset([images, regions])
    assert [mixture[i]["place"] for i in range(3)] == [images.place(0), images.place(1), regions.place(0)]
    assert mixture[4, 2]["task"] == "region_level"
    assert mixture[4, 2]["drawn"] == regions[4, 0]["drawn"] != regions[5, 0]["drawn"]
    assert mixture.place(-1) == regions.place(0)
    assert mixture.tasks.tolist() == [1, 1, 0]
    with pytest.raises(IndexError):
        mixture[3]
    for ratio in ((1,), (1, 0), (1, 0.5)):
        with pytest.raises(ValueError, match="ratio: expected 2 whole numbers of 1 or more"):
            MixtureDataset([images, regions], ratio)
    with pytest.raises(ValueError, match="datasets: expected at least one"):
        MixtureDataset([])


def test_batches_hold_every_sample_once_and_samples_of_alike_length(make_dataset) -> None:
    dataset = make_dataset(1000)
    sampler = LengthGroupedBatchSampler(dataset, 8, drop_last=False)
    batches = [[index for _, index in batch] for batch in sampler]
    assert len(batches) == len(sampler) == 125
    assert sorted(itertools.chain(*batches)) == list(range(1000))

    def padding(batches: list) -> int:
        return sum(int((dataset.lengths[b].max() - dataset.lengths[b]).sum()) for b in batches)

    shuffled = dataset.epoch_order(0, 0).reshape(-1, 8)
    assert padding(batches) < 0.2 * padding(list(shuffled))
    mean_lengths = [dataset.lengths[batch].mean() for batch in batches]
    # Within a group of 32, batches come in no order of length.
    assert abs(np.corrcoef(mean_lengths[:32], range(32))[0, 1]) < 0.6


def test_processes_share_the_batches_of_one(make_dataset) -> None:
    dataset = make_dataset(103)
    for drop_last in (True, False):
        one = LengthGroupedBatchSampler(dataset, 8, seed=3, drop_last=drop_last)
        four = [
            LengthGroupedBatchSampler(dataset, 2, seed=3, rank=rank, world_size=4, drop_last=drop_last)
            for rank in range(4)
        ]
        for epoch in range(2):
            together = [list(itertools.chain(*parts)) for parts in zip(*four, strict=True)]
            alone = list(one)
            assert [sorted(batch) for batch in together] == [sorted(batch) for batch in alone]
            assert len(alone) == len(one) == len(four[2]) == (12 if drop_last else 13)
            assert {e for batch in alone for e, _ in batch} == {epoch}
            assert sum(map(len, alone)) == (96 if drop_last else 103)
    few = [LengthGroupedBatchSampler(dataset, 17, rank=rank, world_size=6, drop_last=False) for rank in range(6)]
    assert [len(list(sampler)) for sampler in few] == [1] * 6  # one sample is left, for six


@pytest.mark.parametrize("batches_seen", [0, 1, 4, 9, 10])
def test_resuming_goes_on_as_if_never_stopped(make_dataset, batches_seen: int) -> None:
    mixture = MixtureDataset([make_dataset(40), make_dataset(20, "region_level", "regions.jsonl")], (2, 1))
    sampler = LengthGroupedBatchSampler(mixture, 6, seed=7)
    assert len(sampler) == 10
    whole = [*sampler, *sampler, *sampler]
    resumed = LengthGroupedBatchSampler(mixture, 6, seed=7)
    resumed.set_epoch(1, start=batches_seen)
    assert [*resumed, *resumed] == whole[10 + batches_seen :]


def test_a_loader_resumes_with_the_same_pictures(pictures, write_lines) -> None:
    """Transforms draw from epoch and index, so the samples are equal, and not only their order."""

    def noted(sample, rng):
        return sample | {"drawn": int(rng.integers(1 << 30))}

    def collate(samples: list) -> list:
        return [(sample["place"], sample["drawn"]) for sample in samples]

    path = write_lines(*[{"image": f"{name}.png"} for name in "abcde"])

    def batches(epoch: int, start: int, num_workers: int) -> list:
        sampler = LengthGroupedBatchSampler(JsonlDataset(path, transforms=[noted]), 1)
        sampler.set_epoch(epoch, start)
        loader = make_loader(sampler, collate, num_workers)
        return [*loader, *loader]

    whole = batches(0, 0, 0)
    assert len({drawn for ((_, drawn),) in whole}) == 10
    assert batches(0, 3, 0) == whole[3:]
    assert batches(1, 2, 2)[:3] == whole[7:]


def test_what_makes_no_batches_is_refused(make_dataset) -> None:
    dataset = make_dataset(5)
    with pytest.raises(ValueError, match="rank: expected 0 to 1"):
        LengthGroupedBatchSampler(dataset, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at most 5 samples in a batch of all processes together, got 3 x 2"):
        LengthGroupedBatchSampler(dataset, 3, world_size=2)
    with pytest.raises(ValueError, match="batch_size, world_size: expected 1 or more"):
        LengthGroupedBatchSampler(dataset, 0)
    with pytest.raises(ValueError, match="0 to 5 batches, got 0 and 6"):
        LengthGroupedBatchSampler(dataset, 1).set_epoch(0, 6)
    with pytest.raises(ValueError, match="num_workers: expected 0 or more"):
        make_loader(LengthGroupedBatchSampler(dataset, 1), list, -1)
