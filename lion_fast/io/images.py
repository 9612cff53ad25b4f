"""Loading images of any type as upright 8-bit RGB."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from lion_fast.io.arrays import expect_dense, image_from_array, image_from_tensor
from lion_fast.io.decoding import FORMATS, convert, decode
from lion_fast.io.image_checks import MAX_DECODING_BYTES, MAX_PIXELS, MAX_SIDE, noting
from lion_fast.io.image_sources import content_of, download, is_one
from lion_fast.io.reading import on_one_line

ImageLike = Image.Image | str | os.PathLike | bytes | BinaryIO | Mapping[str, Any] | np.ndarray | torch.Tensor

__all__ = [
    "MAX_DECODING_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "ImageLike",
    "image_suffixes",
    "load_batches",
    "load_each",
    "load_image",
    "load_images",
]

_SHOWN = 500  # characters of a path


def load_image(image: ImageLike, name: str = "image") -> Image.Image:
    """Load an image as RGB, oriented by its EXIF data.

    Transparency is dropped, not blended, as in the original model (`convert("RGB")`). 16-bit grey is scaled to 8 bits;
    Pillow's 32-bit mode "I" counts as 8-bit if no value is above 255. An animation gives the first frame of a file, and
    the current frame of a PIL image.

    Memory is bounded: an image has at most `MAX_PIXELS` pixels and `MAX_SIDE` pixels per side, and decoding it takes at
    most `MAX_DECODING_BYTES`, estimated from size, mode and format before the pixels are allocated.

    Args:
        image: a PIL image of any mode; the path of an image file, its content as bytes, or a file opened in binary
            mode; a row's `{"bytes": ..., "path": ...}`; a data URI; a numpy array or torch tensor of shape [H, W],
            [H, W, C] or [C, H, W] with C of 1, 3 or 4 (if both match, an array is [H, W, C] and a tensor [C, H, W]).
            Values of arrays: integers 0..255, `uint16` 0..65535, booleans, or floats 0..1.
        name: name of the image in error messages.

    Raises:
        FileNotFoundError: the path is not a file.
        OSError: the file system cannot say whether it is one.
        ValueError: the file is not a complete image (any exception of a decoder), the image is empty or too large, an
            array has another shape or dtype, a tensor is not dense, or values are out of range or NaN.
        TypeError: `image` has another type.
        Exception: what an object of the caller's own class raises, with a note of the image.
    """
    image = content_of(image, name)
    if isinstance(image, str | os.PathLike):
        with noting(name):
            path = os.fsdecode(image)
        return _read(path, name)
    if isinstance(image, bytes):
        return decode(image, name)
    if isinstance(image, Image.Image):
        return convert(image, name)
    if isinstance(image, torch.Tensor):
        return image_from_tensor(image, name)
    if isinstance(image, np.ndarray):
        return image_from_array(image, name)
    raise TypeError(
        f"{name}: expected a PIL image, a path, bytes, a numpy array or a torch tensor, got {type(image).__name__}"
    )


def load_images(
    images: ImageLike | Sequence[ImageLike], name: str = "images", *, allow_urls: bool = False
) -> list[Image.Image]:
    """Load one image, each of a sequence, or each of an array [B, H, W, C] or [B, C, H, W] with `load_image`.

    Args:
        allow_urls: whether strings that are http or https URLs are downloaded.

    Raises:
        FileNotFoundError, ValueError, TypeError: as for `load_image`, with the image's index (`images[3]`); ValueError
            also for an empty sequence.
    """
    return list(load_each(images, name, allow_urls=allow_urls))


def load_each(
    images: ImageLike | Sequence[ImageLike], name: str = "images", *, allow_urls: bool = False
) -> Iterator[Image.Image]:
    """Yield the images of `load_images`, each of which is loaded when it is asked for."""
    every: Any = images
    if isinstance(every, torch.Tensor):
        expect_dense(every, name)
    is_array = isinstance(every, np.ndarray | torch.Tensor)
    if every.ndim != 4 if is_array else is_one(every) or not isinstance(every, Sequence):
        yield load_image(download(every, name) if allow_urls else every, name)
        return
    with noting(name):
        count = len(every)
    if count == 0:
        raise ValueError(f"{name}: expected at least one image, got none")
    for index in range(count):
        own = f"{name}[{index}]"
        with noting(own):
            image = every[index]
        yield load_image(download(image, own) if allow_urls else image, own)


def image_suffixes() -> frozenset[str]:
    """Return the file name suffixes that `load_image` reads, in lower case and with their dot."""
    Image.init()
    return frozenset(suffix for suffix, known in Image.registered_extensions().items() if known in FORMATS)


def load_batches(
    images: ImageLike | Sequence[ImageLike], batch_size: int, reduce: Callable[[Image.Image], Any] = lambda image: image
) -> Iterator[list[Any]]:
    """Load one image, or each of a sequence, with `load_image`, and yield batches of what is kept of each.

    Args:
        reduce: called with each image as soon as it is loaded, so that one image at a time is held at its full size.

    Raises:
        FileNotFoundError, ValueError, TypeError: as for `load_image`, with the image's index (`images[3]`); ValueError
            also if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    every: Any = [images] if is_one(images) or not isinstance(images, Sequence) else images
    for start in range(0, len(every), batch_size):
        batch = []
        for index in range(start, min(start + batch_size, len(every))):
            with noting(f"images[{index}]"):
                image = every[index]
            batch.append(reduce(load_image(image, f"images[{index}]")))
        yield batch


def _read(path: str, name: str) -> Image.Image:
    name = f"{name} ({on_one_line(path)[:_SHOWN] or 'an empty path'})"
    try:
        found = path and Path(path).is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise OSError(f"{name}: expected an image file, got an error ({error.strerror})") from error
        found = False
    except ValueError:  # a null character
        found = False
    if not found:
        raise FileNotFoundError(f"{name}: expected an image file, got a directory or nothing at that path")
    return decode(path, name)
