"""Tagging of training data: once per image into a file before training, or per image while samples are read."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from lion_fast.data.dataset import JsonlDataset
from lion_fast.data.records import DataError, Record, write_jsonl
from lion_fast.io.images import MAX_PIXELS, load_image
from lion_fast.io.owning import expect_other

logger = logging.getLogger(__name__)


def add_tags(
    dataset: JsonlDataset,
    out: str | os.PathLike,
    tagger: Callable[[list[Image.Image]], Sequence[str]],
    batch_size: int = 32,
    *,
    overwrite: bool = True,
) -> tuple[int, int]:
    """Write a dataset's records with the tags of their images; existing tags are kept.

    Images are identified by their path, so an image with many records is tagged once. Relative paths are written
    unchanged.

    Args:
        dataset: dataset whose records are read. Unless it is strict, an unreadable image is logged and skipped with its
            records.
        out: file to write; must differ from the dataset's file.
        tagger: returns the tags of each image of a list, joined by ", ", like a `RamTagger`.
        batch_size: images per call of the tagger; fewer if they hold more than `MAX_PIXELS` pixels together.
        overwrite: whether a file with content is replaced.

    Returns:
        The number of images that were tagged, and the number of images that were skipped.

    Raises:
        ValueError: `out` is the dataset's file, `batch_size` is below 1, or the tagger does not return one result per
            image.
        OutputExistsError, OutputInUseError: see `write_jsonl`; raised before the first image is tagged.
        DataError: an image cannot be read, or none can; or a record cannot have its tags. The message names file and
            line.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    expect_other(out, [dataset.path])
    untagged: dict[str, int] = {}
    for index in range(len(dataset)):
        record = dataset.record(index)
        if record.tags is None:
            untagged.setdefault(record.image, index)
    tags: dict[str, tuple[str, ...]] = {}

    def records() -> Iterator[Record]:
        readable = _readable(dataset, untagged)
        for batch in _batches(readable, batch_size):
            names = [name for name, _ in batch]
            results = tagger([image for _, image in batch])
            batch.clear()  # before the images of the next one are read
            if len(results) != len(names):
                raise ValueError(f"tagger: expected one result per image ({len(names)}), got {len(results)}")
            for name, joined in zip(names, results, strict=True):
                tags[name] = tuple(_split(joined))
        any_record = False
        for index in range(len(dataset)):
            record = dataset.record(index)
            if record.tags is None:
                if record.image not in tags:
                    continue
                try:
                    record = replace(record, tags=tags[record.image])
                except ValueError as error:
                    raise DataError(f"{dataset.place(index)}: {error}") from error
            any_record = True
            yield record
        if not any_record:
            raise DataError(f"{dataset.path}: none of its images can be read")

    write_jsonl(records(), out, overwrite=overwrite)
    return len(tags), len(untagged) - len(tags)


@dataclass(frozen=True)
class PictureTagger:
    """Adapter that applies a tagger of lists, such as a `RamTagger`, to single images, for `SampleDataset(tagger=...)`.

    Args:
        tagger: returns the tags of each image of a list, joined by ", ".
    """

    tagger: Callable[[list[Image.Image]], Sequence[str]]

    def __call__(self, image: Image.Image) -> list[str]:
        return _split(self.tagger([image])[0])


def _split(joined: str) -> list[str]:
    return [tag.strip() for tag in joined.split(",") if tag.strip()]


def _batches(images: Iterator[tuple[str, Image.Image]], batch_size: int) -> Iterator[list[tuple[str, Image.Image]]]:
    """Yield the images in batches, which the pixels of their full size bound as well as their number."""
    batch, pixels = [], 0
    for name, image in images:
        if batch and (len(batch) == batch_size or pixels + image.width * image.height > MAX_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append((name, image))
        pixels += image.width * image.height
    if batch:
        yield batch


def _readable(dataset: JsonlDataset, images: dict[str, int]) -> Iterator[tuple[str, Image.Image]]:
    """Yield the names of readable images and the images."""
    for name, index in images.items():
        try:
            image = load_image(dataset.image_root / name)
        except (OSError, ValueError) as error:
            message = f"{dataset.place(index)}: {error}"
            if dataset.strict:
                raise DataError(message) from error
            logger.warning("skipped %s", message)
        else:
            yield name, image
