"""Sample order: turns of datasets, batches of similar length, several processes, resumption."""

import itertools
import multiprocessing
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

from lion_fast.data import DataError, JsonlDataset, ProcessBatches, TrainingOrder, make_loader
from lion_fast.data.loader import errors_of_workers

REGION = {"task": "region_level"}


@pytest.fixture
def make_dataset(write_lines):
    """Factory of datasets with `count` records whose questions have random lengths."""

    def make(count: int, task: str = "image_level", name: str = "train.jsonl") -> JsonlDataset:
        lengths = np.random.default_rng(count).integers(1, 100, count)
        return JsonlDataset(
            write_lines(
                *[{"task": task, "question": "q" * int(n), "id": str(i)} for i, n in enumerate(lengths)], name=name
            )
        )

    return make


@pytest.fixture
def two_tasks(make_dataset) -> dict[str, JsonlDataset]:
    return {"images": make_dataset(40), "regions": make_dataset(23, "region_level", "regions.jsonl")}


def order_of(samples: Any, shares: Any = None, **settings: Any) -> TrainingOrder:
    return TrainingOrder(samples, shares, **{"steps": 70, "batch_size": 6, **settings})


@pytest.mark.parametrize("settings", [{}, {"group_by_length": True}], ids=["as drawn", "by length"])
@pytest.mark.parametrize(
    ("sizes", "shares"), [((7, 5), (1, 1)), ((3, 20), (2, 1)), ((4, 9, 6), (1, 3, 2)), ((5,), (1,))]
)
def test_datasets_take_turns_and_all_samples_occur_equally_often(make_dataset, sizes, shares, settings) -> None:
    samples = {f"{i}": make_dataset(size, name=f"{i}.jsonl") for i, size in enumerate(sizes)}
    order = order_of(samples, shares, **settings)
    keys = list(order)
    assert [key.position for key in keys] == list(range(70 * 6))
    within = 32 * 6 if settings else sum(shares)  # grouping by length changes the turns within 32 steps of six
    for begin in range(0, 2 * within, within):
        names = Counter(key.name for key in keys[begin : begin + within])
        rounds = within / sum(shares)
        assert all(abs(names[name] - rounds * share) < 1 for name, share in zip(samples, shares, strict=True))
    for name, size in zip(samples, sizes, strict=True):
        seen = Counter((key.epoch, key.index) for key in keys if key.name == name)
        assert set(seen.values()) == {1}
        last = max(epoch for epoch, _ in seen)
        assert all((epoch, index) in seen for epoch in range(last) for index in range(size))
    assert [order[position] for position in (333, 3, 199)] == [keys[333], keys[3], keys[199]]
    assert keys == list(order_of(samples, shares, **settings))
    assert keys != list(order_of(samples, shares, seed=1, **settings))


def test_equal_datasets_are_shuffled_differently_and_can_alternate_by_step(make_dataset) -> None:
    images, regions = make_dataset(50), make_dataset(50, "region_level", "regions.jsonl")
    keys = list(order_of({"images": images, "regions": regions}))[:100]
    assert [key.name for key in keys[:4]] == ["images", "regions", "images", "regions"]
    assert np.mean([a.index != b.index for a, b in zip(keys[0::2], keys[1::2], strict=True)]) > 0.8
    for grouped in (False, True):
        by_step = list(order_of({"images": images, "regions": regions}, mix="step", group_by_length=grouped))
        names = [{key.name for key in by_step[step * 6 : step * 6 + 6]} for step in range(70)]
        assert names == 35 * [{"images"}, {"regions"}]
    plain = order_of({"images": images}, shuffle=False)
    assert [key.index for key in plain][:51] == [*range(50), 0]


def test_batches_have_samples_of_similar_length(make_dataset) -> None:
    dataset = make_dataset(1000)
    settings: Any = {"steps": 125, "batch_size": 8}
    batches = [
        [key.index for key in batch]
        for batch in ProcessBatches(order_of({"a": dataset}, group_by_length=True, **settings), 8)
    ]
    shuffled = [[key.index for key in batch] for batch in ProcessBatches(order_of({"a": dataset}, **settings), 8)]
    assert sorted(itertools.chain(*batches)) == sorted(itertools.chain(*shuffled)) == list(range(1000))

    def padding(batches: list) -> int:
        return sum(int((dataset.lengths[b].max() - dataset.lengths[b]).sum()) for b in batches)

    assert padding(batches) < 0.2 * padding(shuffled)
    mean_lengths = [dataset.lengths[batch].mean() for batch in batches]
    # Within a group of 32, batches are not ordered by length.
    assert abs(np.corrcoef(mean_lengths[:32], range(32))[0, 1]) < 0.6


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("mix", ["sample", "step"])
def test_processes_split_the_batches_of_one_process_from_any_step(two_tasks, grouped: bool, mix: str) -> None:
    order = order_of(two_tasks, (2, 1), group_by_length=grouped, mix=mix)
    alone = list(ProcessBatches(order, 6))
    assert len(alone) == len(ProcessBatches(order, 6)) == 70
    assert list(itertools.chain(*alone)) == list(order)
    for world, size in ((2, 3), (3, 1), (3, 2)):
        for start in (0, 1, 33, 70):
            ranks = [ProcessBatches(order, size, rank=rank, world_size=world, start=start) for rank in range(world)]
            together = [key for batches in zip(*ranks, strict=True) for batch in batches for key in batch]
            assert together == list(order)[start * 6 :]


def test_a_loader_resumes_with_the_same_images(images: Path, write_lines) -> None:
    """Transforms draw from epoch and index, so the samples are equal in addition to their order."""

    def noted(sample, rng):
        return sample | {"drawn": int(rng.integers(1 << 30))}

    def collate(samples: list) -> list:
        return [(sample["place"], sample["drawn"]) for sample in samples]

    path = write_lines(*[{"image": f"{name}.png"} for name in "abcde"])

    def batches(start: int, num_workers: int) -> list:
        order = order_of({"a": JsonlDataset(path, transforms=[noted])}, steps=10, batch_size=1)
        return list(make_loader(order, collate, start=start, num_workers=num_workers, prefetch=3))

    whole = batches(0, 0)
    assert len({drawn for ((_, drawn),) in whole}) == 10
    assert len({place for ((place, _),) in whole[:5]}) == 5
    assert batches(3, 0) == whole[3:]
    assert batches(7, 2) == whole[7:]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_workers_are_forked_for_any_default_of_python(images: Path, write_lines) -> None:
    """The default is a fork server from Python 3.14 on, to which functions must be pickled."""
    order = order_of({"a": JsonlDataset(write_lines({}, {}))}, steps=2, batch_size=1)
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert list(make_loader(order, lambda samples: len(samples), num_workers=1)) == [1, 1]
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_an_error_of_a_worker_is_one_line() -> None:
    for error in (FileNotFoundError(2, "No such file or directory", "a.tar"), DataError("a.jsonl:3: missing")):
        try:
            raise error
        except (OSError, DataError):
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(type(error)) as found, errors_of_workers():
            wrapped.reraise()
        assert str(found.value) == str(error)
    with pytest.raises(OSError, match=r"two\nlines"), errors_of_workers():
        raise OSError("two\nlines")  # of this process


def test_loading_does_not_change_the_global_generators(images: Path, write_lines) -> None:
    order = order_of({"a": JsonlDataset(write_lines({}, {}))}, steps=2, batch_size=1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(make_loader(order, list, num_workers=0))
    assert torch.equal(torch.rand(1), expected)


def test_invalid_arguments_are_rejected(two_tasks) -> None:
    class Unknown(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

    for shares in ((1,), (1, 0), (1, 0.5)):
        with pytest.raises(ValueError, match="shares: expected 2 positive integers"):
            order_of(two_tasks, shares)
    with pytest.raises(ValueError, match="samples: expected datasets with samples, got none"):
        order_of({})
    with pytest.raises(ValueError, match="steps, batch_size: expected 1 or more each, got 0 and 6"):
        order_of(two_tasks, steps=0)
    with pytest.raises(ValueError, match="group_by_length: expected false without shuffle"):
        order_of(two_tasks, group_by_length=True, shuffle=False)
    with pytest.raises(ValueError, match=r"group_by_length: expected datasets with known text lengths .* got mine"):
        order_of({"mine": Unknown()}, group_by_length=True)
    order = order_of(two_tasks)
    with pytest.raises(IndexError, match=r"position: expected 0..419, got 420"):
        order[420]
    with pytest.raises(ValueError, match="rank: expected 0 to 1"):
        ProcessBatches(order, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="times 2 processes, divides the batch of 6, got 4"):
        ProcessBatches(order, 4, world_size=2)
    with pytest.raises(ValueError, match="start: expected a step of 0 to 70, got 71"):
        ProcessBatches(order, 6, start=71)
    with pytest.raises(ValueError, match="num_workers: expected 0 or more, got -1"):
        make_loader(order, list, num_workers=-1)
    with pytest.raises(ValueError, match="prefetch: expected 1 or more, got 0"):
        make_loader(order, list, prefetch=0)
