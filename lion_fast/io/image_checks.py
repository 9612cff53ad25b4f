"""What all ways to read an image share: the limits of its size, and errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager

from lion_fast.io.reading import brief

MAX_PIXELS = 89_478_485
"""Largest image, in pixels: a quarter of a GiB as RGB, and the size above which Pillow warns."""

MAX_SIDE = 131_072
"""Longest side of an image, in pixels: twice JPEG's maximum. Resizing needs memory in proportion to each side alone."""

MAX_DECODING_BYTES = 1_000_000_000
"""Most memory for decoding one image, in bytes, as estimated from its size, mode and format."""

MAX_SCAN_PIXELS = 50 * MAX_PIXELS
"""Most pixels in all scans of a JPEG file. A progressive file of a camera or an editor has about ten scans."""


def check_size(width: int, height: int, name: str) -> None:
    """Check the size of an image before its pixels are allocated.

    Raises:
        ValueError: the image has no pixels, more than `MAX_PIXELS`, or a side longer than `MAX_SIDE`.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{name}: expected an image with pixels, got {width} x {height}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels, got {width} x {height}")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{name}: expected at most {MAX_SIDE} pixels per side, got {width} x {height}")


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Turn any exception of a reader into a ValueError of one line that names the image.

    Only for calls into libraries that read untrusted data: they raise anything, from `struct.error` to MemoryError.

    Args:
        what: what was expected, such as "an image file".
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: expected {what}: {brief(error)}") from error


@contextmanager
def noting(name: str) -> Iterator[None]:
    """Add the image's name as a note to what the caller's own object raises, which stays as it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {name}")
        raise
