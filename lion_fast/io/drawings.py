"""Files of drawn images. They carry a mark, so that a new drawing may replace an earlier one but no other image."""

import io
import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lion_fast.io.atomic import whole_file
from lion_fast.io.owning import expect_free, expect_other, is_stream
from lion_fast.io.reading import naming_path

_KEY, _MARK = "Software", "lion-fast locate"


def expect_drawing(path: Path, image: str | os.PathLike, name: str = "--output", *, overwrite: bool = False) -> None:
    """Check that a drawing of `image` may be written to `path`: it is new, or an earlier drawing in PNG.

    Raises:
        ValueError: it is the image itself, or its suffix is not that of a format that Pillow writes.
        OutputExistsError: it is another file, without `overwrite`.
    """
    expect_other(path, [Path(image)], name)
    format_of(path, name)
    expect_free(path, name, overwrite=overwrite or _is_drawing(path))


def save_drawing(image: Image.Image, path: Path) -> None:
    """Write a drawing atomically, in the format of the suffix.

    Raises:
        ValueError: no format has this suffix.
        OSError: it cannot be written.
    """
    format = format_of(path)
    mark = PngInfo()
    mark.add_text(_KEY, _MARK)
    content = io.BytesIO()
    image.save(content, format, **({"pnginfo": mark} if format == "PNG" else {}))
    with whole_file(path) as unfinished, naming_path(path):
        unfinished.write_bytes(content.getvalue())


def format_of(path: Path, name: str = "path") -> str:
    """Return Pillow's name of the format that a suffix stands for.

    Raises:
        ValueError: Pillow writes none with this suffix.
    """
    format = Image.registered_extensions().get(path.suffix.lower(), "")
    if format not in Image.SAVE:
        raise ValueError(f"{name}: expected a suffix of an image format, such as .png, got {path}")
    return format


def _is_drawing(path: Path) -> bool:
    if is_stream(path) or not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(_KEY) == _MARK
    except (OSError, ValueError, SyntaxError):  # no PNG, or a damaged one
        return False
