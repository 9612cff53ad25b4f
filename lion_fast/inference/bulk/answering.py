"""The models that fill in the rows: LION, and RAM for tags."""

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.outputs import Row
from lion_fast.inference.bulk.preparing import (
    Encode,
    Inputs,
    Prepared,
    Reduce,
    encode_for_lion,
    encode_for_tagger,
    reduce_for_tagger,
)
from lion_fast.inference.loading import compute_dtype
from lion_fast.inference.pipeline import LionPipeline
from lion_fast.tagging.loading import load_tagger


class Answerer(ABC):
    """A model on its device.

    Args:
        job: job with the model's directory.
        device: device of the model, whose dtype is `dtype_of(job, device)`.

    Attributes:
        encode, reduce: turn images into inputs of the model (see `Preparer`); pickled to the workers.

    Raises:
        ValueError: the directory does not hold such a model.
    """

    encode: Encode
    reduce: Reduce

    def __init__(self, job: BulkJob, device: torch.device):
        self.job, self.device = job, device

    @torch.inference_mode()
    def __call__(self, prepared: Prepared) -> list[Row]:
        """Return the completed rows of a batch."""
        if prepared.inputs is not None:
            unfinished = [row for row in prepared.rows if row["error"] is None]
            found = self._answers(prepared.inputs, prepared.sizes)
            for row, values in zip(unfinished, found, strict=True):
                row.update(values)
        return prepared.rows

    @abstractmethod
    def _answers(self, inputs: Inputs, sizes: list[tuple[int, int]]) -> list[Row]:
        """Return the model's fields for each input without an error."""


class LionAnswerer(Answerer):
    def __init__(self, job: BulkJob, device: torch.device):
        super().__init__(job, device)
        self.pipeline = LionPipeline(job.model, device=device)
        self.reduce = self.pipeline.processor.resize
        self.encode = partial(encode_for_lion, job, self.pipeline.processor)
        limits = {"num_beams": job.num_beams, "max_new_tokens": job.max_new_tokens}
        self.limits = {name: value for name, value in limits.items() if value is not None}

    def _answers(self, inputs: Inputs, sizes: list[tuple[int, int]]) -> list[Row]:
        answers = self.pipeline.answer(inputs, sizes, **self.limits)
        if self.job.command == "locate":
            return [{"answer": answer.text, "boxes": answer.boxes} for answer in answers]
        return [{self.job.definition.fields[-1]: answer.text} for answer in answers]


class TagAnswerer(Answerer):
    def __init__(self, job: BulkJob, device: torch.device):
        super().__init__(job, device)
        self.tagger: Any = load_tagger(Path(job.model), device)
        self.reduce = partial(reduce_for_tagger, self.tagger.config.vision_config.image_size)
        self.encode = encode_for_tagger

    def _answers(self, inputs: Inputs, sizes: list[tuple[int, int]]) -> list[Row]:
        images = list(inputs["images"])
        joined = self.tagger(images, batch_size=len(images))
        return [{"tags": [tag for tag in tags.split(", ") if tag]} for tags in joined]


def load_answerer(job: BulkJob, device: torch.device) -> Answerer:
    """Load the model for a job's command."""
    return (TagAnswerer if job.command == "tag" else LionAnswerer)(job, device)


def dtype_of(job: BulkJob, device: torch.device) -> torch.dtype:
    """Return the dtype of a job's model; the tagger applies thresholds, so it uses float32, as for single images."""
    return torch.float32 if job.command == "tag" else compute_dtype(device)
