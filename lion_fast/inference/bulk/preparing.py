"""Preparation of a model's inputs, which runs in worker processes or threads that decode images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lion_fast.inference.bulk.items import Item, Source, printable
from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.outputs import Row
from lion_fast.io.images import load_image
from lion_fast.processing_lion import LionProcessor

_MESSAGE = 500  # characters of an error in a row

Inputs = dict[str, Any]
Reduce = Callable[[Image.Image], Image.Image]
"""Function that resizes an image to the model's size, so that one image of a batch is held at its full size."""

Encode = Callable[[Sequence[Image.Image], Sequence[Item]], Inputs]
"""Function from reduced images and items to inputs of the model; it raises ValueError or TypeError for invalid ones."""


class Good(NamedTuple):
    """A readable input: its row, reduced image, the (width, height) of the full image, and the item without content."""

    row: Row
    image: Image.Image
    size: tuple[int, int]
    item: Item


class Prepared(NamedTuple):
    """A prepared batch.

    Args:
        rows: one per input, without the model's fields; rows with an error are complete.
        inputs: tensors of the inputs without an error; None if there are none.
        sizes: (width, height) of the images of these inputs.
        failure: why a file of many inputs cannot be read, which ends the job; None if there is no such problem.
    """

    rows: list[Row]
    inputs: Inputs | None
    sizes: list[tuple[int, int]]
    failure: str | None = None


class Preparer:
    """Function that reads and encodes the inputs of a batch; the error of an input is recorded in its row.

    Args:
        encode: turns reduced images and items into inputs of the model.
        reduce: resizes each image as soon as it is decoded.
    """

    def __init__(self, job: BulkJob, source: Source, encode: Encode, reduce: Reduce):
        self.job, self.source, self.encode, self.reduce = job, source, encode, reduce

    def __call__(self, positions: Sequence[int] | np.ndarray) -> Prepared:
        rows: list[Row] = []
        good: list[Good] = []
        asks = self.job.definition.asks
        for index in map(int, positions):
            row = self.job.row(self.source.id(index))
            rows.append(row)
            try:
                item = self.source[index]
            except ValueError as error:
                _fail(row, error)
                continue
            except OSError as error:
                # As a value, because processes and Ray would make a traceback of it.
                return Prepared([], None, [], failure=printable(" ".join(str(error).split())))
            row["image"] = item.name
            try:
                if asks is not None:
                    row[asks] = printable(_text_of(item, self.job))
                image = load_image(item.image)
                # Neither the image nor its file's content stays until the batch is complete.
                good.append(Good(row, self.reduce(image), image.size, replace(item, image=b"")))
                del image, item
            except (ValueError, OSError) as error:
                _fail(row, error)
        try:
            inputs = self._encoded(good)
        except (ValueError, TypeError):
            good = [one for one in good if self._fits(one)]
            inputs = self._encoded(good)
        return Prepared(rows, inputs, [one.size for one in good])

    def _encoded(self, good: list[Good]) -> Inputs | None:
        return self.encode([one.image for one in good], [one.item for one in good]) if good else None

    def _fits(self, one: Good) -> bool:
        try:
            self.encode([one.image], [one.item])
        except (ValueError, TypeError) as error:
            _fail(one.row, error)
            return False
        return True


def readable(batches: Iterable[Prepared]) -> Iterator[Prepared]:
    """Yield batches until a file of many inputs cannot be read.

    Raises:
        OSError: one cannot.
    """
    for prepared in batches:
        if prepared.failure is not None:
            raise OSError(prepared.failure)
        yield prepared


def encode_for_lion(
    job: BulkJob, processor: LionProcessor, images: Sequence[Image.Image], items: Sequence[Item]
) -> Inputs:
    """Encode images and questions with LION's processor."""
    command = job.definition
    encoded = processor(
        images=list(images),
        text=[command.instruction.replace("{}", _text_of(item, job)) for item in items],
        tags=[job.tags if job.tags is not None else item.tags for item in items],
        task=command.task or "",
        return_tensors="pt",
    )
    return dict(encoded)


def reduce_for_tagger(image_size: int, image: Image.Image) -> Image.Image:
    """Resize an image to the tagger's input size in pixels."""
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def encode_for_tagger(images: Sequence[Image.Image], items: Sequence[Item]) -> Inputs:
    """Stack images of the tagger's input size."""
    return {"images": np.stack([np.asarray(image) for image in images])}


def _text_of(item: Item, job: BulkJob) -> str:
    return item.text if item.text is not None else job.text or ""


def _fail(row: Row, error: Exception) -> None:
    message = printable(" ".join(str(error).split()) or type(error).__name__)
    row["error"] = message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}..."
