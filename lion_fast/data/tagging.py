"""Tags by a tagger: ahead of training, each picture once, written to a file; or picture by picture as they are read."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from lion_fast.data.dataset import JsonlDataset
from lion_fast.data.records import DataError, Record, write_jsonl
from lion_fast.io.images import load_image

logger = logging.getLogger(__name__)


def add_tags(
    dataset: JsonlDataset,
    out: str | os.PathLike,
    tagger: Callable[[list[Image.Image]], Sequence[str]],
    batch_size: int = 32,
) -> tuple[int, int]:
    """Write a data set's records with the tags of their pictures; tags that are there already stay.

    Pictures are kept track of by their path, so one with many records is tagged once. Relative paths are written as
    they stand.

    Args:
        dataset: its records are read. Unless it is strict, a picture that cannot be read is left out with its records,
            and logged.
        out: file to write; not the data set's own.
        tagger: gives the tags of each of a list of pictures, joined by ", ", as a `RamTagger` does.
        batch_size: pictures that the tagger sees at once.

    Returns:
        How many pictures were tagged, and how many left out.

    Raises:
        ValueError: for `out` that is the file itself, a batch size below 1, or a tagger that gives another number of
            results than it was given pictures.
        DataError: for a picture that cannot be read, naming file and line.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    if Path(out).exists() and Path(out).samefile(dataset.path):
        raise ValueError(f"out: expected another file than {dataset.path}, which is read")
    untagged: dict[str, int] = {}
    for index in range(len(dataset)):
        record = dataset.record(index)
        if record.tags is None:
            untagged.setdefault(record.image, index)
    tags: dict[str, tuple[str, ...]] = {}
    for batch in _batches(dataset, untagged, batch_size):
        results = tagger([picture for _, picture in batch])
        if len(results) != len(batch):
            raise ValueError(f"tagger: expected one result per picture ({len(batch)}), got {len(results)}")
        for (name, _), joined in zip(batch, results, strict=True):
            tags[name] = tuple(_split(joined))

    def records() -> Iterator[Record]:
        for index in range(len(dataset)):
            record = dataset.record(index)
            if record.tags is not None:
                yield record
            elif record.image in tags:
                yield replace(record, tags=tags[record.image])

    write_jsonl(records(), out)
    return len(tags), len(untagged) - len(tags)


@dataclass(frozen=True)
class PictureTagger:
    """A tagger of lists, such as a `RamTagger`, made one of single pictures for `SampleDataset(tagger=...)`.

    Args:
        tagger: gives the tags of each of a list of pictures, joined by ", ".
    """

    tagger: Callable[[list[Image.Image]], Sequence[str]]

    def __call__(self, image: Image.Image) -> list[str]:
        return _split(self.tagger([image])[0])


def _split(joined: str) -> list[str]:
    return [tag.strip() for tag in joined.split(",") if tag.strip()]


def _batches(dataset: JsonlDataset, images: dict[str, int], batch_size: int) -> Iterator[list[tuple[str, Image.Image]]]:
    """Pictures that can be read, with their names."""
    batch = []
    for name, index in images.items():
        try:
            batch.append((name, load_image(dataset.image_root / name)))
        except (OSError, ValueError) as error:
            message = f"{dataset.place(index)}: {error}"
            if dataset.strict:
                raise DataError(message) from error
            logger.warning("skipped %s", message)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
