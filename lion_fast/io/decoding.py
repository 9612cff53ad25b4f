"""Decoding of image files and PIL images to upright 8-bit RGB, within a bound on memory.

Image files are untrusted. Pillow's decoders raise exceptions of any class on them, and a file of a few kilobytes may
decode to gigabytes. So any exception of a decoder means an unreadable image, and a size is refused before its pixels
are allocated.
"""

import io
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    IcoImagePlugin,
    Image,
    ImageFile,
    PngImagePlugin,
    UnidentifiedImageError,
)

from lion_fast.io.arrays import image_from_rows
from lion_fast.io.image_checks import (
    MAX_DECODING_BYTES,
    MAX_PIXELS,
    MAX_SCAN_PIXELS,
    check_size,
    noting,
    reading,
)
from lion_fast.io.image_cost import bytes_needed, scan_pixels
from lion_fast.io.reading import brief

# Pillow formats that are opened: not EPS, on which Pillow would run Ghostscript, nor other formats without photographs.
# HEIF needs a registered plug-in such as pillow-heif, and AVIF may need one.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: str | bytes, name: str) -> Image.Image:
    """Decode an image file, given by its path or content, to upright RGB.

    Raises:
        ValueError: the file is not a complete image of one of `FORMATS`, or is too large (see `check_size`).
    """
    # Not by its path, which Pillow would map: a file that shrinks meanwhile would then kill the process.
    with reading(name, "an image file"):
        stream = Path(source).open("rb") if isinstance(source, str) else io.BytesIO(source)  # noqa: SIM115
    with stream:
        rgb, orientation = _decoded(stream, name)  # the file's own pixels are freed on return
    return _turned(rgb, orientation, name)


def convert(image: Image.Image, name: str) -> Image.Image:
    """Convert a PIL image, whose file may not have been decoded yet, to upright RGB.

    Raises:
        ValueError: Pillow cannot decode or convert the image, or it is too large (see `check_size`).
        Exception: what a class that is not Pillow's raises, with a note of the image.
    """
    return _turned(*_to_rgb(image, name), name)


def _decoded(stream: BinaryIO, name: str) -> tuple[Image.Image, int]:
    Image.init()
    formats = [known for known in FORMATS if known in Image.OPEN]
    with reading(name, "an image file"):
        icon = _icon_size(stream)
    if icon is not None:
        check_size(*icon, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            file = Image.open(stream, formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels: {brief(error)}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: expected an image file, of one of the formats {', '.join(formats)}") from error
    except Exception as error:
        raise ValueError(f"{name}: expected an image file: {brief(error)}") from error
    with file:
        return _to_rgb(file, name)


def _icon_size(stream: BinaryIO) -> tuple[int, int] | None:
    """Return the size of the image that Pillow decodes on opening an ICO file, whatever the file's directory says."""
    try:
        if stream.read(4) != b"\0\0\1\0":
            return None
        stream.seek(0)
        offset = IcoImagePlugin.IcoFile(stream).entry[0].offset
        stream.seek(offset)
        is_png = stream.read(8) == b"\x89PNG\r\n\x1a\n"
        stream.seek(offset)
        return (PngImagePlugin.PngImageFile if is_png else BmpImagePlugin.DibImageFile)(stream).size
    finally:
        stream.seek(0)


def _to_rgb(image: Image.Image, name: str) -> tuple[Image.Image, int]:
    """Return the image as RGB, and the EXIF orientation by which it has to be turned."""
    with _loading(image, name):
        width, height = image.size
    check_size(width, height, name)
    with _loading(image, name):
        needed, scanned = bytes_needed(image), scan_pixels(image)
    if scanned > MAX_SCAN_PIXELS:
        raise ValueError(
            f"{name}: expected at most {MAX_SCAN_PIXELS} pixels in all scans of a JPEG file, got {scanned} for "
            f"{width} x {height}"
        )
    if needed > MAX_DECODING_BYTES:
        raise ValueError(
            f"{name}: expected at most {MAX_DECODING_BYTES} bytes to decode it, got {needed} for {width} x {height} "
            f"pixels ({image.mode}, {image.format})"
        )
    with _loading(image, name):
        image.load()
        width, height = image.size
    check_size(width, height, name)  # some decoders learn it from the data
    with _loading(image, name):
        orientation, mode = _orientation(image), image.mode
        if mode not in ("I", "F") and not mode.startswith("I;16"):
            rgb = image.convert("RGB")
            rgb.info = {}  # the orientation in it no longer applies
            return rgb, orientation
        extrema: Any = image.getextrema() if mode == "I" else (0, 0)
    low, high = extrema
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"{name}: expected values in 0..65535, got {low}..{high}")
    # Pillow loads 16-bit files without a narrower mode as 32-bit "I", and converts "L" to it.
    dtype = {"I": np.uint8 if high <= 0xFF else np.uint16}.get(mode)

    def rows(first: int, last: int) -> np.ndarray:
        with _loading(image, name):
            return np.asarray(image.crop((0, first, width, last)), dtype)[:, :, None]

    return image_from_rows(rows, (height, width, 1), name), orientation


def _loading(image: Image.Image, name: str) -> AbstractContextManager[None]:
    return reading(name, "a whole image") if _is_decoder(image) else noting(name)


def _is_decoder(image: Image.Image) -> bool:
    """Return whether the image's class is Pillow's or that of a plug-in, rather than the caller's own."""
    return isinstance(image, ImageFile.ImageFile) or type(image).__module__.partition(".")[0] == "PIL"


def _orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow's of damaged EXIF data
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in _TO_UPRIGHT else 1
    except Exception as error:
        if isinstance(error, MemoryError) or not _is_decoder(image):
            raise
        return 1  # damaged EXIF data say nothing about the pixels, and other programs show such images as they are


def _turned(image: Image.Image, orientation: int, name: str) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF data, which fails if other fields are damaged.
    with reading(name, "a whole image"):
        return image if orientation == 1 else image.transpose(_TO_UPRIGHT[orientation])
