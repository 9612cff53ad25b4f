"""From inputs to what a model reads; it runs where pictures are decoded, in processes or threads beside the model's."""

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
"""What the model reads of some pictures; ValueError or TypeError where one of them does not fit."""


class Prepared(NamedTuple):
    """A batch.

    Args:
        rows: one per input, lacking what the model says; those with an error are finished.
        inputs: what the model reads, of the inputs without an error; None if there are none.
        sizes: (width, height) of their pictures.
    """

    rows: list[Row]
    inputs: Inputs | None
    sizes: list[tuple[int, int]]


class Preparer:
    """Reads and encodes the inputs of a batch; what is wrong with one of them becomes the error of its row.

    Args:
        encode: makes the model's inputs.
    """

    def __init__(self, job: BulkJob, source: Source, encode: Encode):
        self.job, self.source, self.encode = job, source, encode

    def __call__(self, positions: Sequence[int] | np.ndarray) -> Prepared:
        rows: list[Row] = []
        good: list[Row] = []
        pictures: list[Image.Image] = []
        items: list[Item] = []
        for index in map(int, positions):
            rows.append(self.job.row(self.source.id(index)))
            try:
                item = self.source[index]
                self._describe(rows[-1], item)
                picture = load_image(item.image)
            except (ValueError, OSError) as error:
                _fail(rows[-1], error)
                continue
            good.append(rows[-1])
            pictures.append(picture)
            items.append(item)
        try:
            inputs = self.encode(pictures, items) if items else None
        except (ValueError, TypeError):
            fits = [self._fits(*one) for one in zip(good, pictures, items, strict=True)]
            pictures = [picture for picture, fit in zip(pictures, fits, strict=True) if fit]
            items = [item for item, fit in zip(items, fits, strict=True) if fit]
            inputs = self.encode(pictures, items) if items else None
        return Prepared(rows, inputs, [picture.size for picture in pictures])

    def _describe(self, row: Row, item: Item) -> None:
        row["image"] = item.name
        asks = self.job.definition.asks
        if asks is not None:
            row[asks] = printable(item.text if item.text is not None else self.job.text or "")

    def _fits(self, row: Row, picture: Image.Image, item: Item) -> bool:
        try:
            self.encode([picture], [item])
        except (ValueError, TypeError) as error:
            _fail(row, error)
            return False
        return True


class LionEncoder:
    """Pictures and questions through LION's processor."""

    def __init__(self, job: BulkJob, processor: LionProcessor):
        self.job, self.processor = job, processor

    def __call__(self, pictures: Sequence[Image.Image], items: Sequence[Item]) -> Inputs:
        command = self.job.definition
        texts = [item.text if item.text is not None else self.job.text or "" for item in items]
        tags = [self.job.tags if self.job.tags is not None else item.tags for item in items]
        encoded = self.processor(
            images=list(pictures),
            text=[command.instruction.replace("{}", text) for text in texts],
            tags=tags,
            task=command.task or "",
            return_tensors="pt",
        )
        return dict(encoded)


class TaggerEncoder:
    """Pictures squashed to the size that a tagger would squash them to: less to hand to its process.

    Args:
        image_size: of the tagger, in pixels.
    """

    def __init__(self, image_size: int):
        self.image_size = image_size

    def __call__(self, pictures: Sequence[Image.Image], items: Sequence[Item]) -> Inputs:
        size = (self.image_size, self.image_size)
        squashed = [np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) for picture in pictures]
        return {"images": np.stack(squashed)}


def _fail(row: Row, error: Exception) -> None:
    row["error"] = printable(" ".join(str(error).split()) or type(error).__name__)
