"""Shards: the same samples as their source file, WebDataset's layout, and rejection of damaged shards."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lion_fast.data import DataError, JsonlDataset, RandomHorizontalFlip, ShardDataset, TrainingOrder
from lion_fast.data.shards import INDEX, write_shards
from lion_fast.scenes import write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> JsonlDataset:
    return JsonlDataset(
        write_scenes(tmp_path_factory.mktemp("scenes"), 20, seed=2, image_size=48, kinds=["rec", "vqa"])
    )


@pytest.fixture(scope="module")
def shards(scenes: JsonlDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    assert len(write_shards(scenes, out, shard_bytes=20_000)) > 8
    return out


def compared(sample: dict[str, Any]) -> tuple:
    return tuple(v.tobytes() if k == "image" else str(v) for k, v in sorted(sample.items()) if k != "place")


def test_shards_hold_the_same_samples(scenes: JsonlDataset, shards: Path) -> None:
    flips = [RandomHorizontalFlip(0.0)]
    dataset = ShardDataset(shards, transforms=flips)
    assert len(dataset) == len(scenes)
    assert sorted(compared(dataset[i]) for i in range(len(dataset))) == sorted(
        compared(scenes[i]) for i in range(len(scenes))
    )
    by_id = {scenes.record(i).id: i for i in range(len(scenes))}
    origin = [by_id[dataset.record(i).id] for i in range(len(dataset))]
    assert dataset.lengths.tolist() == scenes.lengths[origin].tolist()
    assert dataset.tasks.tolist() == scenes.tasks[origin].tolist()
    assert dataset.place(0) == f"{dataset.shards[0]}:byte 512, record 0"


def test_one_task_can_be_selected(shards: Path) -> None:
    both = ShardDataset(shards)
    regions = ShardDataset(shards, task="region_level")
    assert len(regions) == np.count_nonzero(both.tasks == 0) < len(both)
    assert {regions.record(i).task for i in range(len(regions))} == {"region_level"}
    assert sorted(regions.epoch_order(0, 0)) == list(range(len(regions)))
    with pytest.raises(ValueError, match="task: expected"):
        ShardDataset(shards, task="rec")


def test_tar_files_follow_the_layout_of_webdataset(scenes: JsonlDataset, shards: Path) -> None:
    """Members of one sample are adjacent and have the same name up to the first dot."""
    images = set()
    for shard in sorted(shards.glob("*.tar")):
        assert shard.stat().st_size <= 20_000 + tarfile.RECORDSIZE
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            for image, text in zip(members[0::2], members[1::2], strict=True):
                key = image.name.split(".")[0]
                assert (image.name, text.name) == (f"{key}.png", f"{key}.json")
                records = json.load(tar.extractfile(text))
                (name,) = {record["image"] for record in records}
                assert tar.extractfile(image).read() == (scenes.image_root / name).read_bytes()
                images.add(name)
    assert len(images) == 20


def test_an_epoch_reads_a_few_shards_at_a_time(shards: Path) -> None:
    dataset = ShardDataset(shards)
    order = dataset.epoch_order(0, 0)
    assert sorted(order) == list(range(len(dataset)))
    assert not np.array_equal(order, dataset.epoch_order(0, 1))
    of_shard = dataset._rows[order, 0]
    first_eight = {int(shard) for shard in of_shard[:40]}
    assert np.count_nonzero(np.diff(of_shard[:40])) > 20  # samples of these shards are mixed
    last_of_first = max(np.flatnonzero(np.isin(of_shard, list(first_eight))))
    assert len(first_eight) <= 8
    assert last_of_first < len(order) - 1
    keys = list(TrainingOrder({"a": dataset}, steps=len(dataset) // 4, batch_size=4, group_by_length=True))
    firsts = {int(dataset._rows[key.index, 0]) for key in keys[:40]}
    assert len(firsts) <= 8


def test_a_bad_image_raises_or_is_skipped(
    images: Path, write_lines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines({}, {"image": "cut.jpg"}, {"image": "cut.jpg"}, {"image": "b.png"})
    with pytest.raises(DataError, match=r"train.jsonl:2: image .*cut.jpg"):
        write_shards(JsonlDataset(path), tmp_path / "strict")
    with pytest.raises(FileNotFoundError, match="directory: expected shards and their index"):
        ShardDataset(tmp_path / "strict")
    write_shards(JsonlDataset(path, strict=False), tmp_path / "lenient")
    assert len(ShardDataset(tmp_path / "lenient")) == 2
    assert f"skipped 2 records: {path}:2: " in caplog.text
    with pytest.raises(ValueError, match="out: expected an empty or new directory"):
        write_shards(JsonlDataset(path), tmp_path / "lenient")
    with pytest.raises(DataError, match="none of its images can be read"):
        write_shards(JsonlDataset(write_lines({"image": "x.png"}), strict=False), tmp_path / "none")


def test_damaged_shards_are_rejected(images: Path, write_lines, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    (shard,) = write_shards(JsonlDataset(write_lines({})), out)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"shard-000000\.tar: expected {len(content)} bytes"):
        ShardDataset(out)
    shard.write_bytes(content.replace(b"a cat", b"\x00    "))
    with pytest.raises(DataError, match=r"shard-000000.tar:byte 512, record 0: not the records"):
        ShardDataset(out)[0]
    (out / INDEX).write_bytes((out / INDEX).read_bytes()[:100])
    with pytest.raises(DataError, match=r"index.npz: not an index of shards"):
        ShardDataset(out)


def index_of(directory: Path) -> dict[str, Any]:
    with np.load(directory / INDEX) as index:
        return {name: np.array(index[name]) for name in index.files}


@pytest.fixture
def two(images: Path, write_lines, tmp_path: Path) -> Path:
    """A directory of one shard with two images, the first of which has two records."""
    out = tmp_path / "shards"
    write_shards(JsonlDataset(write_lines({}, {"question": "Who?"}, {"image": "b.png"})), out, seed=1)
    assert index_of(out)["rows"][:, 5].tolist() == [0, 1, 0]
    return out


@pytest.mark.parametrize("name", ["../out.tar", "/etc/passwd", "sub/x.tar", "..", "", "x.png", "a\\b.tar", "a\nb.tar"])
def test_an_index_names_only_shards_beside_it(two: Path, name: str) -> None:
    content = (two / "shard-000000.tar").read_bytes()
    (two.parent / "out.tar").write_bytes(content)
    np.savez(two / INDEX, **{**index_of(two), "names": [name]})
    with pytest.raises(DataError, match=r"index.npz: expected names of .tar files beside it, got '"):
        ShardDataset(two)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (0, 0, 1, "expected one of 1 shards"),
        (0, 0, -1, "expected one of 1 shards"),
        (0, 1, -512, "expected image at a block of a tar file"),
        (0, 1, 100, "expected image at a block of a tar file"),
        (0, 1, 2**62, "expected image at a block of a tar file"),
        (0, 2, 0, "expected 1 to 1073741824 bytes of image"),
        (0, 2, 2**62, "expected 1 to 1073741824 bytes of image"),
        (2, 4, 20_000, "expected records inside the shard"),
        (0, 3, 512, "expected the records behind their image"),
        (2, 1, 512, "expected images that do not overlap"),
        (1, 5, 7, "expected the records of an image in order"),
        (0, 6, 2, "expected the number of a task"),
        (0, 7, 2**40, "expected the length of a text"),
    ],
)
def test_an_index_is_checked_before_a_shard_is_read(two: Path, row: int, column: int, value: int, message: str) -> None:
    arrays = index_of(two)
    arrays["rows"][row, column] = value
    np.savez(two / INDEX, **arrays)
    with pytest.raises(DataError, match=rf"index.npz: {message}, got \["):
        ShardDataset(two)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", np.zeros((0, 8), np.int64), "holds no sample"),
        ("rows", np.zeros((1, 7), np.int64), "expected rows of 8 numbers, got 7"),
        ("rows", np.zeros((1, 8)), r"not an index of shards .rows: unexpected dtype float64"),
        ("rows", np.zeros(8, np.int64), r"not an index of shards .rows: unexpected shape"),
        ("names", np.array(["a.tar"], object), r"not an index of shards .names: unexpected dtype object"),
        ("names", np.array(["shard-000000.tar"] * 2), "expected one size for each of 2 different names"),
        ("version", 2, "expected an index of version 1, got version 2"),
    ],
)
def test_an_index_of_other_arrays_is_rejected(two: Path, name: str, value: Any, message: str) -> None:
    np.savez(two / INDEX, **{**index_of(two), name: value})
    with pytest.raises(DataError, match=rf"index.npz: {message}"):
        ShardDataset(two)


def test_an_index_cannot_be_larger_than_its_file(two: Path) -> None:
    arrays = index_of(two)
    np.savez_compressed(two / INDEX, **arrays)
    with pytest.raises(DataError, match="version: expected an array that is not compressed"):
        ShardDataset(two)
    np.savez(two / INDEX, **arrays)
    content = (two / INDEX).read_bytes()
    assert content.count(b"(3, 8), ") == 1
    (two / INDEX).write_bytes(content.replace(b"(3, 8), ", b"(9**9,8)"))
    with pytest.raises(DataError, match=r"index.npz: not an index of shards"):
        ShardDataset(two)


def test_a_shard_must_hold_what_the_index_lists(two: Path) -> None:
    shard = two / "shard-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"000000000.json", b"000000009.json"))
    with pytest.raises(DataError, match=r"shard-000000.tar:byte 512, record 0: not the records .*bad checksum"):
        ShardDataset(two)[0]
    dataset = ShardDataset(two)
    shard.write_bytes(content)
    dataset.tasks[0] = 0
    with pytest.raises(DataError, match=r"expected task region_level, as in index.npz, got image_level"):
        dataset[0]
    os.remove(shard)
    os.mkfifo(shard)
    with pytest.raises(DataError, match=r"shard-000000.tar: expected 10240 bytes, as in index.npz, got 0"):
        ShardDataset(two)


def test_an_image_with_the_suffix_of_its_records_is_kept(images: Path, write_lines, tmp_path: Path) -> None:
    (images / "a.png").rename(images / "a.json")
    write_shards(JsonlDataset(write_lines({"image": "a.json"})), tmp_path / "shards")
    assert ShardDataset(tmp_path / "shards")[0]["image"].getpixel((0, 0)) == (255, 0, 0)
