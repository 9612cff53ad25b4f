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
        good: list[Row] = []
        images: list[Image.Image] = []
        items: list[Item] = []
        for index in map(int, positions):
            rows.append(self.job.row(self.source.id(index)))
            try:
                item = self.source[index]
                self._describe(rows[-1], item)
                image = load_image(item.image)
            except (ValueError, OSError) as error:
                _fail(rows[-1], error)
                continue
            good.append(rows[-1])
            images.append(image)
            items.append(item)
        try:
            inputs = self.encode(images, items) if items else None
        except (ValueError, TypeError):
            fits = [self._fits(*one) for one in zip(good, images, items, strict=True)]
            images = [image for image, fit in zip(images, fits, strict=True) if fit]
            items = [item for item, fit in zip(items, fits, strict=True) if fit]
            inputs = self.encode(images, items) if items else None
        return Prepared(rows, inputs, [image.size for image in images])

    def _describe(self, row: Row, item: Item) -> None:
        row["image"] = item.name
        asks = self.job.definition.asks
        if asks is not None:
            row[asks] = printable(item.text if item.text is not None else self.job.text or "")

    def _fits(self, row: Row, image: Image.Image, item: Item) -> bool:
        try:
            self.encode([image], [item])
        except (ValueError, TypeError) as error:
            _fail(row, error)
            return False
        return True


class LionEncoder:
    """Encoder of images and questions with LION's processor."""

    def __init__(self, job: BulkJob, processor: LionProcessor):
        self.job, self.processor = job, processor

    def __call__(self, images: Sequence[Image.Image], items: Sequence[Item]) -> Inputs:
        command = self.job.definition
        texts = [item.text if item.text is not None else self.job.text or "" for item in items]
        tags = [self.job.tags if self.job.tags is not None else item.tags for item in items]
        encoded = self.processor(
            images=list(images),
            text=[command.instruction.replace("{}", text) for text in texts],
            tags=tags,
            task=command.task or "",
            return_tensors="pt",
        )
        return dict(encoded)


class TaggerEncoder:
    """Encoder that resizes images to the tagger's input size, so that less data is sent to its process.

    Args:
        image_size: input size of the tagger in pixels.
    """

    def __init__(self, image_size: int):
        self.image_size = image_size

    def __call__(self, images: Sequence[Image.Image], items: Sequence[Item]) -> Inputs:
        size = (self.image_size, self.image_size)
        resized = [np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in images]
        return {"images": np.stack(resized)}


def _fail(row: Row, error: Exception) -> None:
    row["error"] = printable(" ".join(str(error).split()) or type(error).__name__)
