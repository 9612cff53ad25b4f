"""Samples in a few large files, for disks on which a million small files are slow.

Shards are plain tar files in WebDataset's layout: `000000017.jpg` next to `000000017.json`, a list of the records of
that image, so an image with fifty records is stored once. `index.npz` holds the offsets of all members. Shards
therefore have random access, like a file of JSON lines, and support grouping by length, any number of processes and
resumption in the same way. Their epoch order reads a few shards at a time.
"""

import io
import logging
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lion_fast.data.dataset import JsonlDataset, SampleDataset, Tagger, Transform, check_task, text_length
from lion_fast.data.records import DataError, Record, describe, record_from_fields
from lion_fast.data.shard_index import BLOCK, INDEX, read_index, write_index
from lion_fast.io.atomic import whole_directory
from lion_fast.io.images import image_suffixes, load_image
from lion_fast.io.owning import OutputExistsError, expect_empty
from lion_fast.io.reading import brief, naming, naming_path, opened, parse_json, read_content
from lion_fast.tasks import TASKS

logger = logging.getLogger(__name__)

_SHARDS_AT_A_TIME = 8


def write_shards(
    dataset: JsonlDataset, out: str | os.PathLike, *, shard_bytes: int = 512 << 20, seed: int = 0
) -> list[Path]:
    """Write a dataset's records and images to shards.

    Image files are copied unchanged, in a random order drawn from `seed`, so that each shard is a random sample; every
    image is decoded once as a check. `out` appears when everything has been written; in an existing empty directory,
    the index comes last.

    Args:
        dataset: dataset whose records are read; transforms and tagger do not run. Unless it is strict, an unreadable
            image is logged and skipped with its records.
        out: new or empty directory.
        shard_bytes: maximum size of a shard in bytes (a larger image gets a shard of its own).
        seed: seed of the order.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: `out` is not empty, `shard_bytes` is below 1, or another process is writing to `out`.
        DataError: an image cannot be read (the message names file and line), or none can.
        OSError: the shards cannot be written.
    """
    out = Path(out)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected 1 or more, got {shard_bytes}")
    try:
        expect_empty(out)
    except OutputExistsError as error:
        raise OutputExistsError(f"out: expected an empty or new directory, got {out}") from error
    with whole_directory(out, new=True) as unfinished, naming_path(out, unfinished):
        return [out / name for name in _write(dataset, unfinished, shard_bytes, seed)]


def _write(dataset: JsonlDataset, out: Path, shard_bytes: int, seed: int) -> list[str]:
    """Write the shards and their index, and return the names of the shards."""
    by_image: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        by_image.setdefault(dataset.record(index).image, []).append(index)
    images = list(by_image)
    writer = _ShardWriter(out, shard_bytes)
    rows: list[tuple[int, ...]] = []
    try:
        for number, i in enumerate(np.random.default_rng(seed).permutation(len(images))):
            records = [dataset.record(index) for index in by_image[images[i]]]
            path = dataset.image_root / images[i]
            try:
                load_image(path)
                content = read_content(path)
            except (OSError, ValueError) as error:
                message = f"{dataset.place(by_image[images[i]][0])}: {error}"
                if dataset.strict:
                    raise DataError(message) from error
                logger.warning("skipped %d records: %s", len(records), message)
                continue
            text = ("[" + ",\n".join(record.to_json() for record in records) + "]").encode()
            suffix = path.suffix.lower() if path.suffix.lower() in image_suffixes() else ".img"
            spans = writer.add(f"{number:09d}", {suffix: content, ".json": text})
            rows += [
                (*spans, record_number, TASKS.index(record.task), text_length(record))
                for record_number, record in enumerate(records)
            ]
    finally:
        writer.close()
    if not rows:
        raise DataError(f"{dataset.path}: none of its images can be read")
    write_index(out, writer.shards, rows)
    return [shard.name for shard in writer.shards]


class ShardDataset(SampleDataset):
    """Dataset of a directory written by `write_shards`.

    Args:
        directory: directory of the shards and their index, which takes 70 bytes of memory per sample.
        task: use only the samples of this task; of both tasks if None.
        transforms, tagger, strict, seed: see `SampleDataset`.

    Raises:
        ValueError: unknown task.
        FileNotFoundError: the directory has no index.
        DataError: the index cannot be read or is not one of this directory's shards (`read_index`), or has no sample of
            the task; from `dataset[i]` also: the shard does not hold what the index says, or that part of it
            cannot be read.
        OSError: a shard cannot be opened, or has been truncated.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        transforms: Sequence[Transform] | None = None,
        *,
        task: str | None = None,
        tagger: Tagger | None = None,
        strict: bool = True,
        seed: int = 0,
    ):
        check_task(task)
        self.directory = Path(directory)
        self.shards, self._sizes, rows = read_index(self.directory)
        if task is not None:
            rows = rows[rows[:, 6] == TASKS.index(task)]
        if not len(rows):
            raise DataError(f"{self.directory / INDEX}: holds no sample of task {task}")
        self._rows = rows[:, :6]
        super().__init__(
            rows[:, 6].astype(np.uint8),
            rows[:, 7].astype(np.int32),
            tagger=tagger,
            transforms=transforms,
            strict=strict,
            seed=seed,
        )

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Return all indices in the order of an epoch, int64 [n]: shards are shuffled, and samples within 8 shards."""
        rng = np.random.default_rng([seed, epoch])
        firsts = np.searchsorted(self._rows[:, 0], np.arange(len(self.shards) + 1)).tolist()
        shards = rng.permutation(len(self.shards))
        order = []
        for begin in range(0, len(shards), _SHARDS_AT_A_TIME):
            parts = [np.arange(firsts[s], firsts[s + 1]) for s in shards[begin : begin + _SHARDS_AT_A_TIME]]
            order.append(rng.permutation(np.concatenate(parts)))
        return np.concatenate(order)

    def place(self, index: int) -> str:
        shard, start = self._rows[index, :2]
        return f"{self.shards[shard]}:byte {start}, record {self._rows[index, 5]}"

    def _read(self, index: int) -> tuple[Record, bytes]:
        shard, image_start, image_size, text_start, text_size, number = map(int, self._rows[index])
        place = self.place(index)
        with (
            opened(self.shards[shard], self._sizes[shard]) as file,
            naming(place, "the records that the index lists", DataError),
        ):
            image_name, image = _member(file, image_start, image_size)
            text_name, text = _member(file, text_start, text_size)
            if text_name != f"{image_name.partition('.')[0]}.json":
                raise ValueError(f"expected an image and its .json, got {image_name} and {text_name}")
            fields = parse_json(text)
            if not isinstance(fields, list):
                raise ValueError(f"expected a list of records, got {describe(fields)}")
            fields = fields[number]
        record = record_from_fields(fields, place)
        if record.task != TASKS[self.tasks[index]]:
            raise DataError(f"{place}: expected task {TASKS[self.tasks[index]]}, as in {INDEX}, got {record.task}")
        return record, image


def _member(file: BinaryIO, start: int, size: int) -> tuple[str, bytes]:
    """Return the name and content of a member of a tar file, whose header must agree with the index."""
    try:
        file.seek(start - BLOCK)
        content = file.read(BLOCK + size)
    except OSError as error:  # of this part of the disk, which is no reason to lose the other samples
        raise ValueError(f"expected {BLOCK + size} readable bytes at {start - BLOCK}: {brief(error)}") from error
    header = tarfile.TarInfo.frombuf(content[:BLOCK], "utf-8", "surrogateescape")
    if not header.isreg() or header.size != size or len(content) != BLOCK + size:
        raise ValueError(f"expected a member of {size} bytes, got {header.name} of {header.size}")
    return header.name, content[BLOCK:]


class _ShardWriter:
    """Writer of tar files of limited size that reports the offset of each member's content."""

    def __init__(self, directory: Path, shard_bytes: int):
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.shards: list[Path] = []
        self._tar: Any = None
        self._used = 0

    def add(self, key: str, members: dict[str, bytes]) -> list[int]:
        """Write the members of a key, by suffix; return the shard, then start and size of each member."""
        size = sum(BLOCK * 2 + len(content) for content in members.values())
        if self._tar is None or self._used + size > self.shard_bytes:
            self.close()
            self.shards.append(self.directory / f"shard-{len(self.shards):06d}.tar")
            self._tar = tarfile.open(self.shards[-1], "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._used = 0
        self._used += size
        spans = [len(self.shards) - 1]
        for suffix, content in members.items():
            member = tarfile.TarInfo(key + suffix)
            member.size = len(content)
            # The USTAR header of a short name is one block.
            spans += [self._tar.offset + BLOCK, len(content)]
            with naming_path(self.shards[-1]):
                self._tar.addfile(member, io.BytesIO(content))
        return spans

    def close(self) -> None:
        if self._tar is not None:
            with naming_path(self.shards[-1]):
                self._tar.close()
            self._tar = None
