"""Reading files of any content: regular files only, text in UTF-8, and JSON whose names are unique.

Libraries that read files raise anything on damaged ones; `naming` turns it into one error that names the file. The
kernel names no file when reading one fails; `opened` and `read_content` do.
"""

import codecs
import errno
import json
import math
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Errors of file systems. Readers name their files, so those without a name are of writing.
_OF_FILES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENXIO}

# The first two bytes of UTF-32's mark in little-endian order are UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Repeated:
    """The value of a name that an object of JSON has more than once. No reader accepts it as a value."""


class Unreadable:
    """A value that Python cannot represent, such as text that is not UTF-8. No reader accepts it as a value."""


@contextmanager
def naming(
    path: str | os.PathLike, what: str, error: type[ValueError] = ValueError, *, of_kernel: bool = False
) -> Iterator[None]:
    """Turn any exception inside into an `error` that says that `path` is not `what`.

    Only for calls into libraries that read files: on damaged files they raise anything, up to bare `Exception`, and
    tokenizers' Rust raises a `BaseException`. What names a file already stays as it is: an `error` of a class of our
    own, and a ValueError whose message begins with the path.

    Args:
        of_kernel: whether errors of the kernel, which say nothing about the content, become an `error` too; otherwise
            they stay OSErrors, and name the file.
    """
    try:
        yield
    except BaseException as found:
        if not isinstance(found, Exception) and type(found).__name__ != "PanicException":
            raise
        if isinstance(found, OSError) and found.errno is not None and not of_kernel:
            with naming_path(path):
                raise
        named = error is not ValueError or (type(found) is error and str(found).startswith(on_one_line(path)))
        if isinstance(found, error) and named:
            raise
        raise error(f"{on_one_line(path)}: not {what} ({brief(found)})") from found


@contextmanager
def naming_path(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[None]:
    """Make every OSError name the file: the kernel names none when writing, syncing or reading fails.

    Args:
        path: file that is read or written.
        temporary: where it is written until it is finished; errors that name this name `path` instead. Errors without
            a name are then taken for this file's only if file systems raise them.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str | os.PathLike):
            if temporary is not None:
                error.filename = _instead(error.filename, str(temporary), str(path))
                if error.filename2 is not None:  # of renaming
                    error.filename2 = _instead(error.filename2, str(temporary), str(path))
        elif error.errno is None and temporary is not None and str(temporary) in str(error):
            raise OSError(str(error).replace(str(temporary), str(path))) from error
        elif error.filename is None and (temporary is None or error.errno in _OF_FILES):
            if error.errno is not None and error.strerror is not None and len(error.args) == 2:
                error.filename = str(path)
            elif str(path) not in str(error):
                raise OSError(f"{path}: {brief(error)}") from error
        raise


def _instead(given: object, hidden: str, path: str) -> object:
    """Return the name `given` by an error, in or of `path` if it is in or of `hidden`."""
    if not isinstance(given, str | os.PathLike):
        return given
    name = os.fspath(given)
    return path + name[len(hidden) :] if name == hidden or name.startswith(hidden + os.sep) else given


@contextmanager
def opened(path: str | os.PathLike, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading; every OSError inside names it.

    Args:
        size: bytes that the file had when it was read before, if what is read now was found then.

    Raises:
        OSError: the file cannot be opened or read, or is shorter, before or after.
    """
    with naming_path(path), Path(path).open("rb") as file:
        if size is None:
            yield file
            return
        expect_size(file, path, size)
        try:
            yield file
        finally:  # also instead of an error of what was read
            expect_size(file, path, size)


def expect_size(file: BinaryIO, path: str | os.PathLike, size: int) -> None:
    """Check that no other program has truncated an open file.

    Raises:
        OSError: it is shorter than `size` bytes; the message names `path`.
    """
    found = os.fstat(file.fileno()).st_size
    if found < size:
        raise OSError(f"{on_one_line(path)}: expected {size} bytes, as when it was first read, got {found}")


def read_content(path: str | os.PathLike) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file cannot be read; the message names it.
    """
    with opened(path) as file:
        return file.read()


def brief(error: BaseException) -> str:
    """Return an error's message on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def shown(value: Any) -> str:
    """Return a value for a message: on one line of at most 120 characters, and a tensor as its dtype and shape."""
    text = _short.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...{text[-1]}"


class _Short(reprlib.Repr):
    """Representations that take little time and memory, whatever the value."""

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[:_SHOWN])

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:_SHOWN])

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of more than 4300 digits.
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        torch: Any = sys.modules.get("torch")  # not imported, because commands read files without it
        if torch is not None and isinstance(x, torch.Tensor):
            return f"a tensor {x.dtype} {list(x.shape)}"
        try:
            return " ".join(repr(x).split())
        except Exception as error:  # of the user's own object
            return f"{type(x).__name__}, whose repr raises {type(error).__name__}"


_SHOWN = 120
_short = _Short()
_short.maxlevel = 4
_short.maxdict = 6  # as lists, of reprlib's own bounds


def on_one_line(path: str | os.PathLike) -> str:
    """Return a path for a message: as it is, or escaped if it has line breaks or bytes that are not UTF-8."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)[1:-1]


def check_regular(path: Path, what: str) -> None:
    """Refuse a path that is no regular file; opening a pipe or a device could wait forever.

    Raises:
        FileNotFoundError: it is something else, or there is nothing.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{on_one_line(path)}: expected {what}, got {_kind(path)}")


def check_utf8(content: bytes) -> None:
    """Refuse content that begins with the byte order mark of another encoding.

    Raises:
        ValueError: it is UTF-16 or UTF-32.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"expected UTF-8, got {encoding}")


def without_mark(content: bytes) -> bytes:
    """Return content without UTF-8's byte order mark, which editors on Windows write."""
    return content.removeprefix(codecs.BOM_UTF8)


def parse_json(content: str | bytes, *, standard: bool = True) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    A name that an object has more than once gets the value `Repeated()`, which no reader accepts, instead of one of its
    values.

    Args:
        content: text, or bytes in UTF-8.
        standard: whether NaN, Infinity and integers beyond Python's limit of digits are errors. Otherwise they are
            floats that are not finite, so that one such number does not make a whole file unreadable.

    Raises:
        ValueError: the content is not JSON; the message has one line.
    """
    try:
        if isinstance(content, bytes):
            check_utf8(content)
            content = content.decode("utf-8")
        return (_STANDARD if standard else _LENIENT).decode(content.removeprefix("\ufeff"))
    except RecursionError as error:
        raise ValueError("not JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({brief(error)})") from error


def _kind(path: Path) -> str:
    if os.path.isdir(path):
        return "a directory"
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "a link to nothing" if os.path.islink(path) else "nothing at that path"
    except OSError as error:
        return f"an error ({error.strerror})"
    return "a pipe, a socket or a device"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        fields.update((name, Repeated()) for name, count in counts.items() if count > 1)
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _integer(digits: str) -> int | float:
    limit = sys.get_int_max_str_digits()
    return int(digits) if not limit or len(digits) <= limit else -math.inf if digits[0] == "-" else math.inf


_STANDARD = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
