"""What stands for an image elsewhere: a row of a data set, an open file, a data URI, a chat's entry, a URL."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from lion_fast.io.image_checks import noting, reading
from lion_fast.io.reading import brief

MAX_FILE_BYTES = 1 << 30
"""Largest file that is read from an open file or decoded from a data URI."""

_TIMEOUT = 60.0  # seconds without an answer
_URL = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://", "file://")


def content_of(image: Any, name: str) -> Any:
    """Return the path or the content of the image file that `image` stands for, or `image` itself.

    Args:
        image: `{"bytes": ..., "path": ...}` as in Hugging Face's data sets, of which one may be None; a file opened in
            binary mode, such as `io.BytesIO`, which is read from its start; a data URI (`data:image/png;base64,...`);
            or anything else, which is returned as it is.
        name: name of the image in error messages.

    Raises:
        ValueError: the dict holds neither content nor path, the data URI is not valid base64, the file is larger than
            `MAX_FILE_BYTES`, or a string is a URL, because nothing is downloaded.
        TypeError: the file is not opened in binary mode.
    """
    if isinstance(image, str):
        return _of_text(image, name)
    if isinstance(image, Mapping):
        return _of_row(image, name)
    if hasattr(image, "read"):
        return _read_whole(image, name)
    return image


def is_one(images: Any) -> bool:
    """Return whether `images` stands for one image although Python can iterate over it."""
    return isinstance(images, str | bytes | Mapping) or hasattr(images, "read")


def base64_content(text: str, name: str) -> bytes:
    """Decode base64.

    Raises:
        ValueError: it is not valid base64, or longer than `MAX_FILE_BYTES` is when encoded.
    """
    if len(text) > MAX_FILE_BYTES * 4 // 3:
        raise ValueError(f"{name}: expected at most {MAX_FILE_BYTES} bytes in base64, got {len(text)} characters")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: expected base64, got {text[:40]!r} ({error})") from error


def download(image: Any, name: str) -> Any:
    """Return the content behind an http or https URL, or `image` itself if it is none.

    Raises:
        ValueError: the server's answer is no success, or larger than `MAX_FILE_BYTES`.
        OSError: the server does not answer.
    """
    if not isinstance(image, str) or not image[:8].lower().startswith(("http://", "https://")):
        return image
    import httpx

    content = bytearray()
    try:
        with httpx.stream("GET", image, follow_redirects=True, timeout=_TIMEOUT) as answer:
            if not answer.is_success:
                raise ValueError(f"{name}: expected an image at {image[:200]}, got HTTP status {answer.status_code}")
            for part in answer.iter_bytes():
                content += part
                if len(content) > MAX_FILE_BYTES:
                    raise ValueError(f"{name}: expected at most {MAX_FILE_BYTES} bytes at {image[:200]}, got more")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"{name}: no answer from {image[:200]} ({brief(error)})") from error
    return bytes(content)


def flattened(images: Any, count: int, name: str = "images") -> Any:
    """Return images of which each may be in a list of its own, as chats give them, without these lists.

    Raises:
        ValueError: such a list does not hold exactly one image, or `images` is one list of several images for a single
            text.
    """
    if not isinstance(images, list | tuple) or not any(isinstance(entry, list | tuple) for entry in images):
        return images
    flat = []
    for index, entry in enumerate(images):
        own = entry if isinstance(entry, list | tuple) else [entry]
        if len(own) != 1:
            raise ValueError(f"{name}[{index}]: expected one image for each of {count} texts, got {len(own)}")
        flat += own
    return flat


def _of_text(text: str, name: str) -> str | bytes:
    start = text[:16].lower()
    if start.startswith("data:"):
        head, comma, encoded = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError(f"{name}: expected data:image/...;base64,..., got {text[:40]!r}")
        return base64_content(encoded, name)
    if start.startswith(_URL):
        raise ValueError(
            f"{name}: expected an image or a path, got the URL {text[:200]!r}; nothing is downloaded unless the "
            "processor gets allow_urls=True"
        )
    return text


def _of_row(row: Mapping[str, Any], name: str) -> Any:
    unknown = sorted(set(map(str, row)) - {"bytes", "path"})
    if unknown:
        raise TypeError(f"{name}: expected a dict of 'bytes' and 'path', got one with {', '.join(unknown)[:200]}")
    content, path = row.get("bytes"), row.get("path")
    if content is not None:
        if not isinstance(content, bytes | bytearray | memoryview):
            raise TypeError(f"{name}['bytes']: expected bytes, got {type(content).__name__}")
        return bytes(content)
    if not isinstance(path, str) or not path:
        raise ValueError(f"{name}: expected a dict with 'bytes' or 'path', got neither")
    return _of_text(path, name)


def _read_whole(file: Any, name: str) -> bytes:
    # Python's own files raise ValueError if they are closed, and any OSError of the file system.
    with reading(name, "a readable file") if type(file).__module__ in ("_io", "tempfile") else noting(name):
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        content = file.read(MAX_FILE_BYTES + 1)
    if not isinstance(content, bytes):
        raise TypeError(f"{name}: expected a file opened in binary mode, got one that reads {type(content).__name__}")
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{name}: expected a file of at most {MAX_FILE_BYTES} bytes, got a larger one")
    return content
