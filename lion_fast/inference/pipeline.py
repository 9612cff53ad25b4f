"""Images and questions to answers in one call: batching, `generate` and decoding, shared by all commands."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from lion_fast.configuration_lion import KERNEL_BACKENDS
from lion_fast.inference.loading import compute_dtype, default_device, load_complete
from lion_fast.io.boxes import parse_boxes
from lion_fast.io.checkpoints import naming
from lion_fast.io.image_sources import is_one
from lion_fast.io.images import ImageLike, load_image
from lion_fast.io.reading import shown
from lion_fast.model.image_features import ImageFeatures
from lion_fast.model.prompts import CAPTION_INSTRUCTION
from lion_fast.model.validation import expect_integer
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor, Tagger, Tags
from lion_fast.tagging.distinct import DistinctTags


class LionAnswer(NamedTuple):
    """An answer about one image.

    Args:
        text: text of the answer.
        boxes: boxes in the text, [x1, y1, x2, y2] in pixels of the upright image; [] for none.
    """

    text: str
    boxes: list[list[float]]


class LionPipeline:
    """A model with its processor, which maps images and questions to answers.

    Example:
        >>> pipe = LionPipeline("runs/quickstart/checkpoint")
        >>> pipe("street.jpg").text
        "a dog pulls a cart"
        >>> locate = "In the image <image>, can you locate the cart and let me know its coordinates?"
        >>> pipe(["street.jpg", "yard.jpg"], locate, task="region_level")[0].boxes
        [[43.0, 4.2, 63.1, 22.5]]

    Args:
        model: directory of a checkpoint, or a loaded model, which is set to evaluation mode.
        processor: processor of a loaded model; a directory has its own.
        device: device for a directory's model; a GPU if available by default.
        dtype: dtype for a directory's model; bfloat16 on a GPU and float32 on a CPU by default.
        kernel_backend: backend for a directory's model, see `LionConfig`; the configuration's value if None.

    Raises:
        ValueError: the directory does not exist, or an argument is for a directory's or a loaded model only.
        CheckpointError: the directory has no processor or no complete LION model.
    """

    def __init__(
        self,
        model: str | os.PathLike | LionForCausalLM,
        processor: LionProcessor | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        kernel_backend: str | None = None,
    ):
        self.model: Any
        if isinstance(model, str | os.PathLike):
            if processor is not None:
                raise ValueError("processor: expected None with a directory, which has its own, got one")
            self.model, self.processor = _load(Path(model), device, dtype, kernel_backend)
            return
        for name, value in (("device", device), ("dtype", dtype), ("kernel_backend", kernel_backend)):
            if value is not None:
                raise ValueError(f"{name}: expected None for a loaded model, got {value!r}")
        if not (hasattr(model, "generate") and hasattr(model, "eval")):
            raise TypeError(f"model: expected a checkpoint's directory or a loaded model, got {shown(model)}")
        if not (callable(processor) and hasattr(processor, "batch_decode")):
            raise ValueError(f"processor: expected the LionProcessor of the loaded model, got {shown(processor)}")
        self.model, self.processor = model.eval(), processor

    @overload
    def __call__(
        self,
        images: ImageLike,
        text: str | None = None,
        task: str = "image_level",
        tags: Tags | Tagger = None,
        *,
        batch_size: int = 8,
        **generation: Any,
    ) -> LionAnswer: ...
    @overload
    def __call__(
        self,
        images: Sequence[ImageLike],
        text: str | Iterable[str] | None = None,
        task: str | Iterable[str] = "image_level",
        tags: str | Iterable[Tags] | Tagger | None = None,
        *,
        batch_size: int = 8,
        **generation: Any,
    ) -> list[LionAnswer]: ...
    @overload
    def __call__(
        self,
        images: Iterable[ImageLike],
        text: str | Iterable[str] | None = None,
        task: str | Iterable[str] = "image_level",
        tags: str | Iterable[Tags] | Tagger | None = None,
        *,
        batch_size: int = 8,
        **generation: Any,
    ) -> Iterator[LionAnswer]: ...
    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        text: str | Iterable[str] | None = None,
        task: str | Iterable[str] = "image_level",
        tags: Any = None,
        *,
        batch_size: int = 8,
        **generation: Any,
    ) -> LionAnswer | list[LionAnswer] | Iterator[LionAnswer]:
        """Answer questions about images, in the order of the images.

        Args:
            images: one image, anything that `load_image` reads; a sequence of images; or any other iterable, which is
                read one batch at a time.
            text: a question or an instruction for all images, or one per image; None asks for captions.
            task: `"image_level"` (captions, questions) or `"region_level"` (boxes), for all images or one per image.
            tags: `"dog, cart, man"` for all images; a string, a list of strings or None per image; or a tagger, see
                `LionProcessor`. With a single image, a list of strings holds the tags of that image.
            batch_size: images per batch.
            generation: arguments of `generate`, such as `num_beams` and `max_new_tokens`; the checkpoint's by default.

        Returns:
            One answer for a single image, a list for a sequence, and an iterator for any other iterable.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image cannot be read (see `load_image`).
            ValueError, TypeError: as for `LionProcessor`; the number of texts, tasks or tags is not that of images;
                `batch_size` is below 1; `generation` does not give one answer per image.
        """
        expect_integer("batch_size", batch_size, 1)
        if is_one(images) or isinstance(images, np.ndarray | Tensor) or not isinstance(images, Iterable):
            own = tags if tags is None or callable(tags) else [tags]
            one: Any = images
            (answer,) = self._stream([load_image(one, "images")], text, task, own, 1, generation)
            return answer
        answers = self._stream(images, text, task, tags, batch_size, generation)
        return list(answers) if isinstance(images, Sequence) else answers

    def answer(
        self, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], **generation: Any
    ) -> list[LionAnswer]:
        """Answer one batch prepared by the processor.

        Args:
            inputs: output of `LionProcessor` for B images; moved to the model's device.
            sizes: (width, height) of each upright image in pixels, for the boxes.
            generation: arguments of `generate`.

        Raises:
            ValueError: `generation` does not give one answer per image.
        """
        for name, value in inputs.items():
            if not isinstance(value, Tensor | ImageFeatures):
                raise TypeError(f"inputs[{name!r}]: expected a tensor, got {shown(value)}")
        on_device = {name: tensor.to(self.model.device, non_blocking=True) for name, tensor in inputs.items()}
        texts, _ = generate_texts(self.model, self.processor, on_device, **generation)
        if len(texts) != len(sizes):
            raise ValueError(f"num_return_sequences: expected 1, got {len(texts)} answers for {len(sizes)} images")
        return [LionAnswer(text, parse_boxes(text, size)) for text, size in zip(texts, sizes, strict=True)]

    def _stream(
        self, images: Iterable[Any], text: Any, task: Any, tags: Any, batch_size: int, generation: dict[str, Any]
    ) -> Iterator[LionAnswer]:
        text = CAPTION_INSTRUCTION if text is None else text
        samples, start = _samples(images, {"text": text, "task": task, "tags": tags}), 0
        while True:
            tagger: Any = tags if callable(tags) else None
            tagging, sizes, batch = None if tagger is None else DistinctTags(tagger), [], []
            for image, *row in itertools.islice(samples, batch_size):  # one at a time is held at its full size
                if tagging is not None:
                    tagging.add(image)
                sizes.append(image.size)
                batch.append((self.processor.resize(image), *row))
            if not batch:
                return
            try:
                reduced, texts, tasks, own = map(list, zip(*batch, strict=True))
                known: Any = own if tagging is None else tagging.of_each()
                inputs = self.processor(images=reduced, text=texts, tags=known, task=tasks, return_tensors="pt")
            except (ValueError, TypeError) as error:
                error.add_note(f"in the batch that starts with images[{start}]")
                raise
            yield from self.answer(inputs, sizes, **generation)
            start += len(batch)


def generate_texts(
    model: Any, processor: Any, inputs: Mapping[str, Any], **generation: Any
) -> tuple[list[str], Tensor]:
    """Generate the answers to a batch, as stripped text and as token ids.

    Args:
        model: object with `generate`.
        processor: object with `batch_decode`.
        inputs: inputs of B samples, on the model's device.
        generation: arguments of `generate`.

    Returns:
        B texts, and their token ids, int64 [B, L].

    Raises:
        ValueError: `generate` returns anything but token ids.
    """
    ids = model.generate(**inputs, **generation)
    if not isinstance(ids, Tensor):
        raise ValueError(f"return_dict_in_generate: expected False, got the output {type(ids).__name__}")
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)], ids


def _load(
    directory: Path, device: str | torch.device | None, dtype: torch.dtype | None, kernel_backend: str | None
) -> tuple[LionForCausalLM, LionProcessor]:
    if not directory.is_dir():
        raise ValueError(f"model: expected a checkpoint's directory, got {directory}")
    if kernel_backend is not None and kernel_backend not in KERNEL_BACKENDS:
        raise ValueError(f"kernel_backend: expected one of {', '.join(KERNEL_BACKENDS)}, got {kernel_backend!r}")
    device = default_device() if device is None else _device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating torch.dtype, got {shown(dtype)}")
    with naming(directory, "a directory with LION's processor"):
        processor = LionProcessor.from_pretrained(directory)
    settings = {} if kernel_backend is None else {"kernel_backend": kernel_backend}
    return load_complete(directory, dtype or compute_dtype(device), **settings).to(device), processor


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a device such as 'cpu' or 'cuda:0', got {shown(device)}") from error


def _samples(images: Iterable[ImageLike], columns: Mapping[str, Any]) -> Iterator[tuple]:
    """Yield each loaded image with its value of every column; a string, None or a tagger holds for all images.

    Raises:
        TypeError, ValueError: a column has the wrong type, or its number of values is not that of images.
    """
    each = {}
    for name, values in columns.items():
        if values is None or isinstance(values, str) or callable(values):
            each[name] = itertools.repeat(values)
        elif not isinstance(values, Iterable):
            raise TypeError(f"{name}: expected a string or one per image, got {type(values).__name__}")
        elif isinstance(values, Sized) and isinstance(images, Sized) and len(values) != len(images):
            raise ValueError(f"{name}: expected one per image ({len(images)}), got {len(values)}")
        else:
            each[name] = iter(values)
    end, count = object(), 0
    for image in images:
        row = {name: next(values, end) for name, values in each.items()}
        for name, value in row.items():
            if value is end:
                raise ValueError(f"{name}: expected one per image, got {count} for more images")
        yield load_image(image, f"images[{count}]"), *row.values()
        count += 1
    for name, values in each.items():
        if not isinstance(values, itertools.repeat) and next(values, end) is not end:
            raise ValueError(f"{name}: expected one per image ({count}), got more")
