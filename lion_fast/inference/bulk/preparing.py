"""Preparation of a model's inputs, which runs in worker processes or threads that decode images."""

from collections.abc import Callable, Sequence
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
Encode = Callable[[Sequence[Image.Image], Sequence[Item]], Inputs]
"""Function from images and items to inputs of the model; it raises ValueError or TypeError for invalid ones."""


class Prepared(NamedTuple):
    """A prepared batch.

    Args:
        rows: one per input, without the model's fields; rows with an error are complete.
        inputs: tensors of the inputs without an error; None if there are none.
        sizes: (width, height) of the images of these inputs.
    """

    rows: list[Row]
    inputs: Inputs | None
    sizes: list[tuple[int, int]]


class Preparer:
    """Function that reads and encodes the inputs of a batch; the error of an input is recorded in its row.

    Args:
        encode: turns images and items into inputs of the model.
    """

    def __init__(self, job: BulkJob, source: Source, encode: Encode):
        self.job, self.source, self.encode = job, source, encode

    def __call__(self, positions: Sequence[int] | np.ndarray) -> Prepared:
        rows: list[Row] = []
        good: list[tuple[Row, Image.Image, Item]] = []
        asks = self.job.definition.asks
        for index in map(int, positions):
            row = self.job.row(self.source.id(index))
            rows.append(row)
            try:
                item = self.source[index]
                row["image"] = item.name
                if asks is not None:
                    row[asks] = printable(_text_of(item, self.job))
                good.append((row, load_image(item.image), item))
            except (ValueError, OSError) as error:
                _fail(row, error)
        try:
            inputs = self._encoded(good)
        except (ValueError, TypeError):
            good = [one for one in good if self._fits(*one)]
            inputs = self._encoded(good)
        return Prepared(rows, inputs, [image.size for _, image, _ in good])

    def _encoded(self, good: list[tuple[Row, Image.Image, Item]]) -> Inputs | None:
        return self.encode([image for _, image, _ in good], [item for _, _, item in good]) if good else None

    def _fits(self, row: Row, image: Image.Image, item: Item) -> bool:
        try:
            self.encode([image], [item])
        except (ValueError, TypeError) as error:
            _fail(row, error)
            return False
        return True


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


def encode_for_tagger(image_size: int, images: Sequence[Image.Image], items: Sequence[Item]) -> Inputs:
    """Resize images to the tagger's input size in pixels, so that less data is sent to its process."""
    size = (image_size, image_size)
    return {"images": np.stack([np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in images])}


def _text_of(item: Item, job: BulkJob) -> str:
    return item.text if item.text is not None else job.text or ""


def _fail(row: Row, error: Exception) -> None:
    message = printable(" ".join(str(error).split()) or type(error).__name__)
    row["error"] = message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}..."
