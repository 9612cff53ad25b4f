"""Map-style datasets of samples on disk, and the one that reads a file of JSON lines."""

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

from lion_fast.data.records import MAX_LINE_BYTES, DataError, Record, parse_record
from lion_fast.io.images import load_image
from lion_fast.io.reading import check_utf8, opened, without_mark
from lion_fast.tasks import TASKS

logger = logging.getLogger(__name__)

_SHOWN = 10  # bad lines that are logged individually; further ones are only counted

Sample = dict[str, Any]
Transform = Callable[[Sample, np.random.Generator], Sample]
Tagger = Callable[[Image.Image], Sequence[str]]
Accepts = Callable[[Record], object]


class EpochDataset(Dataset, ABC):
    """A dataset whose samples may depend on the epoch: `dataset[epoch, i]`; `dataset[i]` is sample i of epoch 0.

    Attributes:
        lengths: int [n], length of each sample's text; None if unknown before reading.
    """

    lengths: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: int | tuple[int, int]) -> Sample: ...

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the indices of all samples in the order of an epoch, int64 [n]."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))


class SampleDataset(EpochDataset):
    """Base of map-style datasets with random access.

    `dataset[i]` is sample i of epoch 0 and `dataset[epoch, i]` that of another epoch. Transforms draw from
    (seed, epoch, i) alone, so a sample is the same in every process, in every order, and after every resumption. A
    sample is a dict:

        image: PIL.Image, upright RGB
        task: "image_level" or "region_level"
        question, answer: str
        tags: list[str], or None if the record has none and there is no tagger
        boxes: list of [x1, y1, x2, y2], 0..1 of the image's width and height; [] for none
        id: str or None
        place: str, the location of the sample, such as "train.jsonl:17"

    Args:
        tasks: uint8 [n], indices into `TASKS`.
        lengths: int32 [n], characters of tags, question and answer.
        tagger: returns the tags of an image for records without tags. The tagger gets the image before transforms and
            runs in the process that reads the sample, such as a worker.
        transforms: applied in order, each `transform(sample, rng) -> sample`.
        strict: whether an unreadable image raises an error. Otherwise the next readable sample of the same task
            replaces the sample, so batches keep their size; the image is logged and counted in `num_bad_images`.
        seed: seed of the transforms.

    Attributes:
        accepts: called with each record before its image is read; a ValueError from it makes the sample unusable, like
            an unreadable image. None accepts every record. Training sets it to what the model's processor accepts.

    Raises:
        DataError: from `dataset[i]`, naming file and line: the record or the image cannot be read.
    """

    accepts: Accepts | None = None

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
        # In shared memory, so that every process sees the flags that workers set; setting a flag twice is harmless.
        self._bad = torch.zeros(len(tasks), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def num_bad_images(self) -> int:
        """Number of samples whose image has been unreadable so far, in all workers; always 0 with `strict`."""
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
        """Return the sample's record without reading its image."""
        return self._read(range(len(self))[index])[0]

    @abstractmethod
    def place(self, index: int) -> str:
        """Return the location of the sample, for messages."""

    @abstractmethod
    def _read(self, index: int) -> tuple[Record, Path | bytes]:
        """Return the sample's record, and the path or the content of its image file."""

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
            if self.accepts is not None:
                self.accepts(record)
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
    """Dataset of a file of JSON lines (`docs/data.md`).

    On creation, the file is read once and every line is checked; 22 bytes per sample stay in memory. Blank lines are
    ignored.

    Args:
        path: path of the file.
        image_root: directory that image paths are relative to; the directory of the file if None.
        task: use only the samples of this task; of both tasks if None.
        tagger, transforms, seed: see `SampleDataset`.
        strict: whether an invalid line, and later an unreadable image, raises an error. Otherwise invalid lines are
            skipped; the first ten are logged, all are counted in `num_bad_lines`.

    Raises:
        ValueError: unknown task.
        FileNotFoundError: the file does not exist.
        DataError: a line is not a valid record, or the file is not UTF-8 or has no sample.
        OSError: the file cannot be read; from `dataset[i]` also: it has been truncated.
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
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"path: expected a file of JSON lines, got a directory or nothing at {self.path}")
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        self.num_bad_lines = 0
        offsets, numbers, tasks, lengths = array("q"), array("q"), array("B"), array("i")
        first_error = None
        with opened(self.path) as file:
            self._size = os.fstat(file.fileno()).st_size
            try:
                check_utf8(file.read(4))
            except ValueError as error:
                raise DataError(f"{self.path}: {error}") from error
            file.seek(0)
            for number, (offset, line) in enumerate(lines_with_offsets(file), 1):
                try:
                    if line is not None and is_blank(line):
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
        with opened(self.path, self._size) as file:
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
    """Return the number of characters of question, answer and tags, by which batches are grouped."""
    return len(record.question) + len(record.answer) + sum(len(tag) + 2 for tag in record.tags or ())


def is_blank(line: bytes) -> bool:
    return not without_mark(line).strip()


def lines_with_offsets(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its offset; None for a line longer than `MAX_LINE_BYTES`, which is never held in memory."""
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
