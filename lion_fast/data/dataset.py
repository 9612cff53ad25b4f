"""Samples on disk as torch data sets: a file of JSON lines, read by position."""

import logging
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from lion_fast.configuration_lion import TASKS
from lion_fast.data.records import DataError, Record, parse_record
from lion_fast.io.images import load_image

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 20
"""Longest line that is read; a longer one is no sample, whatever it holds."""

_SHOWN = 10  # bad lines that are named one by one before they are only counted

Sample = dict[str, Any]
Transform = Callable[[Sample, np.random.Generator], Sample]
Tagger = Callable[[Image.Image], Sequence[str]]


class EpochDataset(Dataset, ABC):
    """Samples that may change from epoch to epoch: `dataset[epoch, i]`; `dataset[i]` is sample i as epoch 0 sees it.

    Attributes:
        lengths: int [n], how long each sample's text is; None where that is not known ahead.
    """

    lengths: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: int | tuple[int, int]) -> Sample: ...

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """All samples in the order of an epoch, int64 [n]."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))


class SampleDataset(EpochDataset):
    """Samples with a fixed number, each of which can be read by itself.

    `dataset[i]` is the sample as epoch 0 sees it, `dataset[epoch, i]` as that epoch does: transforms draw from
    (seed, epoch, i) alone, so a sample is the same in every process, in every order, and after every resumption. A
    sample is a dict:

        image: PIL.Image, upright RGB
        task: "image_level" or "region_level"
        question, answer: str
        tags: list[str], or None where the record has none and there is no tagger
        boxes: list of [x1, y1, x2, y2], 0..1 of the image's width and height; [] for none
        id: str or None
        place: str, where the sample stands, such as "train.jsonl:17"

    Args:
        tasks: uint8 [n], positions in `TASKS`.
        lengths: int32 [n], characters of tags, question and answer.
        tagger: gives the tags of a picture for records that have none. It sees the picture before transforms and runs
            where the sample is read, in a worker if there are any.
        transforms: applied in turn, each `transform(sample, rng) -> sample`.
        strict: whether a picture that cannot be read is an error. Otherwise the next readable sample of the same task
            takes its place, so batches keep their size; it is logged, and counted in `num_bad_images`.
        seed: of the transforms.

    Raises:
        DataError: from `dataset[i]`, naming file and line, for a record or picture that cannot be read.
    """

    def __init__(
        self,
        tasks: np.ndarray,
        lengths: np.ndarray,
        *,
        tagger: Tagger | None,
        transforms: Sequence[Transform] | None,
        strict: bool,
        seed: int,
    ):
        self.tasks = tasks
        self.lengths = lengths
        self.tagger = tagger
        self.transforms = tuple(transforms or ())
        self.strict = strict
        self.seed = seed
        # In shared memory, so that what workers find shows in every process. A flag is set twice without harm.
        self._bad = torch.zeros(len(tasks), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def num_bad_images(self) -> int:
        """Pictures, by sample, that could not be read so far, in all workers; with `strict` an error comes first."""
        return int(self._bad.sum())

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        if self.strict:
            return self._load(epoch, index)
        for candidate in self._candidates(index):
            if self._bad[candidate]:
                continue
            try:
                return self._load(epoch, candidate)
            except DataError as error:
                self._bad[candidate] = 1
                logger.warning("skipped %s", error)
        raise DataError(
            f"{self.place(index)}: neither this nor any other {TASKS[self.tasks[index]]} sample is readable"
        )

    def record(self, index: int) -> Record:
        """The sample's record; its picture is not read."""
        return self._read(range(len(self))[index])[0]

    @abstractmethod
    def place(self, index: int) -> str:
        """Where the sample stands, for messages."""

    @abstractmethod
    def _read(self, index: int) -> tuple[Record, Path | bytes]:
        """The sample's record and its picture's file or content."""

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if self.tasks[other] == self.tasks[index]:
                yield other

    def _load(self, epoch: int, index: int) -> Sample:
        record, source = self._read(index)
        place = self.place(index)
        try:
            image = load_image(source, name="image")
        except (OSError, ValueError) as error:
            raise DataError(f"{place}: {error}") from error
        tags = record.tags if record.tags is not None or self.tagger is None else self.tagger(image)
        sample = {
            "image": image,
            "task": record.task,
            "question": record.question,
            "answer": record.answer,
            "tags": None if tags is None else list(tags),
            "boxes": [list(box) for box in record.boxes],
            "id": record.id,
            "place": place,
        }
        if self.transforms:
            rng = np.random.default_rng([self.seed, epoch, index])
            for transform in self.transforms:
                sample = transform(sample, rng)
        return sample


class JsonlDataset(SampleDataset):
    """The samples of a file of JSON lines (`docs/data.md`).

    The file is read once, line by line, and every line checked; what stays in memory is 22 bytes a sample. Blank lines
    are passed over.

    Args:
        path: the file.
        image_root: what relative paths of pictures start from; the file's own folder if None.
        task: take only the samples of this task; of both if None.
        tagger, transforms, seed: see `SampleDataset`.
        strict: whether a bad line, and later a bad picture, is an error. Otherwise bad lines are left out; the first
            ten are logged, all are counted in `num_bad_lines`.

    Raises:
        ValueError: for an unknown task.
        FileNotFoundError: no such file.
        DataError: for a line that is no record, and for a file without a sample.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_root: str | os.PathLike | None = None,
        transforms: Sequence[Transform] | None = None,
        *,
        task: str | None = None,
        tagger: Tagger | None = None,
        strict: bool = True,
        seed: int = 0,
    ):
        check_task(task)
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path: expected a file of JSON lines, got a directory or nothing at {self.path}")
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        self.num_bad_lines = 0
        offsets, numbers, tasks, lengths = array("q"), array("q"), array("B"), array("i")
        first_error = None
        with self.path.open("rb") as file:
            for number, (offset, line) in enumerate(lines_with_offsets(file), 1):
                try:
                    if not (line is None or line.strip()):
                        continue
                    record = self._parse(line, number)
                except DataError as error:
                    if strict:
                        raise
                    first_error = first_error or error
                    self.num_bad_lines += 1
                    if self.num_bad_lines <= _SHOWN:
                        logger.warning("skipped %s", error)
                    continue
                if task is not None and record.task != task:
                    continue
                offsets.append(offset)
                numbers.append(number)
                tasks.append(TASKS.index(record.task))
                lengths.append(text_length(record))
        if self.num_bad_lines > _SHOWN:
            logger.warning("%s: %d lines skipped in all", self.path, self.num_bad_lines)
        if not offsets:
            raise DataError(
                f"{self.path}: holds no sample"
                + (f" of task {task}" if task else "")
                + (f"; the first error: {first_error}" if first_error else "")
            )
        self._offsets, self._numbers = np.array(offsets), np.array(numbers)
        super().__init__(
            np.array(tasks), np.array(lengths), tagger=tagger, transforms=transforms, strict=strict, seed=seed
        )

    def place(self, index: int) -> str:
        return f"{self.path}:{self._numbers[index]}"

    def _read(self, index: int) -> tuple[Record, Path]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            record = self._parse(file.readline(MAX_LINE_BYTES), int(self._numbers[index]))
        return record, self.image_root / record.image

    def _parse(self, line: bytes | None, number: int) -> Record:
        place = f"{self.path}:{number}"
        if line is None:
            raise DataError(f"{place}: expected at most {MAX_LINE_BYTES} bytes in a line")
        return parse_record(line, place)


def check_task(task: str | None) -> None:
    if task is not None and task not in TASKS:
        raise ValueError(f"task: expected {' or '.join(map(repr, TASKS))}, or None for both, got {task!r}")


def text_length(record: Record) -> int:
    """Characters of what the model reads and says, by which batches are grouped."""
    return len(record.question) + len(record.answer) + sum(len(tag) + 2 for tag in record.tags or ())


def lines_with_offsets(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its offset; None for one longer than `MAX_LINE_BYTES`, of which no more is held than that."""
    offset = 0
    while line := file.readline(MAX_LINE_BYTES):
        size = len(line)
        if size == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                size += len(rest)
            size += len(rest)
            yield offset, None
        else:
            yield offset, line
        offset += size
