"""Loading images of any type as upright 8-bit RGB."""

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image

from lion_fast.io.image_sources import content_of, download, is_one

ImageLike = Image.Image | str | os.PathLike | bytes | BinaryIO | Mapping[str, Any] | np.ndarray | torch.Tensor

MAX_PIXELS = 89_478_485
"""Largest image read from a file, in pixels: a quarter of a GiB as RGB, and the size above which Pillow warns."""

# Pillow formats that are opened: not EPS, on which Pillow would run Ghostscript, nor other formats without photographs.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA

# The exceptions that Pillow's decoders raised on 88,000 damaged files of 18 formats.
_UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError)

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(image: ImageLike, name: str = "image") -> Image.Image:
    """Load an image as RGB, oriented by its EXIF data.

    Transparency is dropped, not blended, as in the original model (`convert("RGB")`). 16-bit grey is scaled to 8 bits;
    Pillow's 32-bit mode "I" counts as 8-bit if no value is above 255. An animation gives the first frame of a file, and
    the current frame of a PIL image.

    Args:
        image: a PIL image of any mode; the path of an image file, its content as bytes, or a file opened in binary
            mode; a row's `{"bytes": ..., "path": ...}`; a data URI; a numpy array or
            torch tensor of shape [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4 (if both match, an array is
            [H, W, C] and a tensor [C, H, W]). Values of arrays: integers 0..255, `uint16` 0..65535, booleans, or floats
            0..1.
        name: name of the image in error messages.

    Raises:
        FileNotFoundError: the path is not a file.
        ValueError: the file is not a complete image or has more than `MAX_PIXELS` pixels, the image is empty, an array
            has another shape, or values are out of range or NaN.
        TypeError: `image` has another type.
    """
    image = content_of(image, name)
    if isinstance(image, str | os.PathLike):
        return _read(os.fspath(image), name)
    if isinstance(image, bytes):
        return _decode(io.BytesIO(image), name)
    if isinstance(image, Image.Image):
        return _convert(image, name)
    if isinstance(image, torch.Tensor):
        if image.layout is not torch.strided or image.is_quantized or image.is_meta:
            raise ValueError(
                f"{name}: expected a plain dense tensor, got one that is sparse, quantized or without values"
            )
        tensor = image.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return _from_array(array, name, channels_first=True)
    if isinstance(image, np.ndarray):
        return _from_array(image, name, channels_first=False)
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
    every: Any = images
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim != 4:
            return [load_image(images, name)]
    elif is_one(images) or not isinstance(images, Sequence):
        return [load_image(download(every, name) if allow_urls else every, name)]
    if len(every) == 0:
        raise ValueError(f"{name}: expected at least one image, got none")
    names = [f"{name}[{i}]" for i in range(len(every))]
    if allow_urls:
        every = [download(image, own) for image, own in zip(every, names, strict=True)]
    return [load_image(image, own) for image, own in zip(every, names, strict=True)]


def image_suffixes() -> frozenset[str]:
    """Return the file name suffixes that `load_image` reads, in lower case and with their dot."""
    Image.init()
    return frozenset(suffix for suffix, known in Image.registered_extensions().items() if known in _FORMATS)


def load_batches(images: ImageLike | Sequence[ImageLike], batch_size: int) -> Iterator[list[Image.Image]]:
    """Load one image, or each of a sequence, with `load_image`, and yield batches; files are opened batch by batch.

    Raises:
        FileNotFoundError, ValueError, TypeError: as for `load_image`, with the image's index (`images[3]`); ValueError
            also if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    every: Any = [images] if is_one(images) or not isinstance(images, Sequence) else images
    for start in range(0, len(every), batch_size):
        batch = enumerate(every[start : start + batch_size], start)
        yield [load_image(image, f"images[{index}]") for index, image in batch]


def _read(path: str, name: str) -> Image.Image:
    name = f"{name} ({path or 'an empty path'})"
    try:
        found = path and Path(path).is_file()
    except (OSError, ValueError):  # the path is too long or contains a null character
        found = False
    if not found:
        raise FileNotFoundError(f"{name}: expected an image file, got a directory or nothing at that path")
    return _decode(path, name)


def _decode(source: str | io.BytesIO, name: str) -> Image.Image:
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            file = Image.open(source, formats=[known for known in _FORMATS if known in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels: {error}") from error
    except _UNREADABLE as error:
        raise ValueError(f"{name}: expected an image file: {error}") from error
    with file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels, got {file.width} x {file.height}")
        return _convert(file, name)


def _convert(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name}: expected an image with pixels, got {image.width} x {image.height}")
    try:
        image = _upright(image)
        if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
            rgb = image.convert("RGB")
            rgb.info.clear()  # its orientation no longer applies
            return rgb
        pixels = np.asarray(image)
    except _UNREADABLE as error:
        raise ValueError(f"{name}: expected a whole image: {error}") from error
    if image.mode == "I":
        # Pillow loads 16-bit files without a narrower mode as 32-bit.
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"{name}: expected values in 0..65535, got {pixels.min()}..{pixels.max()}")
        pixels = pixels.astype(np.uint8 if pixels.max() <= 0xFF else np.uint16)  # converted from "L", or 16 bits
    return _from_array(pixels, name, channels_first=False)


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF data, which fails if other fields are damaged.
    image.load()
    transposition = _TO_UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if transposition is None else image.transpose(transposition)


def _from_array(array: np.ndarray, name: str, channels_first: bool) -> Image.Image:
    if array.size == 0:
        raise ValueError(f"{name}: expected an image with pixels, got shape {array.shape}")
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and array.shape[0] in _CHANNELS and (channels_first or array.shape[2] not in _CHANNELS):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in _CHANNELS:
        raise ValueError(f"{name}: expected [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, got {array.shape}")
    pixels = _to_uint8(array, name)
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[:, :, 0]).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    kind, width = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        return array.astype(np.uint8) * 255
    if kind == "u" and width == 2:
        return (array >> 8).astype(np.uint8)  # as Pillow reads 16-bit colour
    if kind not in "uif":
        raise ValueError(f"{name}: expected integers, booleans or floats, got {array.dtype}")
    low, high = array.min(), array.max()
    if kind in "ui":
        if low < 0 or high > 255:
            raise ValueError(f"{name}: expected {array.dtype} values in 0..255, got {low}..{high}")
        return array.astype(np.uint8)
    overshoot = 0.5 / 255  # tolerates rounding errors of the input, which still round to 0 or 255
    if not (low >= -overshoot and high <= 1 + overshoot):
        raise ValueError(
            f"{name}: expected {array.dtype} values in 0..1, got {low:.4g}..{high:.4g}; "
            "pass values in 0..255 as uint8; normalised pixels are not supported"
        )
    return np.rint(array.clip(0, 1) * 255).astype(np.uint8)
