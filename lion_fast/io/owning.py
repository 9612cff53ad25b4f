"""Whose an output is: nothing of the user's is replaced unasked, one process writes it, and errors name it.

A lock is a hidden empty file beside the output, `.NAME.lock`. The kernel releases it when the process ends, however it
ends; a file that a kill left is used and removed by the next writer.
"""

import errno
import logging
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from lion_fast.io.reading import naming_path

if os.name != "nt":
    import fcntl

UNFINISHED = ".unfinished"
_LOCK = ".lock"
_LONGEST = 200  # bytes of a name that still leave room for what temporary names add; file systems take 255
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

logger = logging.getLogger(__name__)
_held: dict[str, int] = {}  # lock file -> process: locks of the kernel do not exclude other threads of a process
_held_guard = threading.Lock()


class OutputExistsError(FileExistsError, ValueError):
    """The output has content that is not known to be the writer's own."""


class OutputInUseError(BlockingIOError, ValueError):
    """Another process or thread is writing the output."""


def is_stream(path: Path) -> bool:
    """Return whether writing goes elsewhere than into a file: a pipe, a device, or /dev/stdout wherever it leads."""
    for _ in range(40):  # links that the kernel follows
        if any(path.absolute().is_relative_to(system) for system in ("/dev", "/proc")):
            return not path.absolute().is_relative_to("/dev/shm")
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return path.exists() and not path.is_file() and not path.is_dir()


def file_behind(path: Path) -> int | None:
    """Return the number of the open descriptor that a stream such as /dev/stdout names, if it leads to a file.

    Opening such a name anew would empty the file, or write over what it holds, after `>>` for example.
    """
    for _ in range(40):  # links that the kernel follows
        if path.name.isdecimal() and os.path.realpath(path.parent) == os.path.realpath("/proc/self/fd"):
            number = int(path.name)
            return number if stat.S_ISREG(os.fstat(number).st_mode) else None
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def expect_free(path: str | os.PathLike, name: str = "out", *, overwrite: bool = False) -> None:
    """Check that a file may be written: there is none, an empty one, or a stream; with `overwrite`, any file.

    Raises:
        OutputExistsError: there is a file with content; the message starts with `name`.
        OSError: there is a directory, a link that leads to itself, or something else that cannot be looked at.
    """
    path = Path(path)
    if is_stream(path):
        return
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got the directory {path}")
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = 0
    if not overwrite and size:
        raise OutputExistsError(f"{name}: expected the name of a new file, got {path}, which exists (see --overwrite)")


def expect_other(path: str | os.PathLike, inputs: Sequence[Path], name: str = "out") -> None:
    """Check that a file to write is none of the inputs, under any name that leads to it.

    Raises:
        ValueError: it is one; the message starts with `name`.
    """
    for file in inputs:
        if os.path.realpath(path) == os.path.realpath(file) or (
            os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file)
        ):
            raise ValueError(f"{name}: expected a file other than the input, got {path}, which is {file}")


def expect_empty(directory: Path, name: str = "out") -> None:
    """Check that a directory may be filled: there is none, or it holds nothing but what a killed writer left.

    Raises:
        OutputExistsError: there is something else; the message starts with `name`.
    """
    if directory.is_dir():
        ours = _leftover(directory)
        if all(ours.fullmatch(entry) or entry == _hidden(directory, _LOCK).name for entry in os.listdir(directory)):
            return
    elif not os.path.lexists(directory):
        return
    raise OutputExistsError(f"{name}: expected a directory that is empty or does not exist yet, got {directory}")


@contextmanager
def sole_writer(path: Path, name: str = "out", *, inside: bool = False) -> Iterator[None]:
    """Hold the lock of an output, and remove what killed writers of it left.

    Args:
        path: output, without symbolic links; its directory exists.
        inside: keep lock and temporary files in the directory `path` instead of beside it.

    Raises:
        OutputInUseError: another process or thread holds it; the message starts with `name`.
        OSError: the directory cannot be written.
    """
    folder = path if inside else path.parent
    lock = folder / _hidden(path, _LOCK).name
    key = os.path.realpath(lock)
    with _held_guard:
        # The file must not even be opened twice: closing it would release the lock.
        if _held.get(key) == os.getpid():
            raise _in_use(name, path)
        _held[key] = os.getpid()
    try:
        descriptor = _locked(lock, path, name)
        try:
            _remove_leftovers(folder, path)
            yield
        finally:
            if not os.fstat(descriptor).st_size:  # never a file of the user's
                lock.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with _held_guard:
            del _held[key]


def temporary_beside(path: Path, *, inside: bool = False) -> Path:
    """Return a new temporary name for `path`, beside it or in it, which `sole_writer` removes after a kill."""
    folder = path if inside else path.parent
    return folder / _hidden(path, f"-{uuid4().hex[:8]}{UNFINISHED}").name


@contextmanager
def made_directories(directory: Path) -> Iterator[None]:
    """Make a directory with its parents, and remove those that were made if an error leaves them empty."""
    made: list[Path] = []
    missing = directory
    while not os.path.lexists(missing):
        made.append(missing)
        missing = missing.parent
    if not missing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(missing))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # something is in it, or another process removed it
                break
        raise


def _locked(lock: Path, path: Path, name: str) -> int:
    """Open and lock a file, and return its descriptor."""
    while True:
        with naming_path(path, lock):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if os.name != "nt":
                # Locks of `lockf` belong to this process: forked workers, which may outlive it, do not hold them.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False)):
                return descriptor
        except FileNotFoundError:  # the writer that had it has just removed it
            pass
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                logger.warning("%s: its file system has no locks; let only one process at a time write it", path)
                return descriptor
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _in_use(name, path) from error
            raise
        os.close(descriptor)


def _in_use(name: str, path: Path) -> OutputInUseError:
    return OutputInUseError(f"{name}: expected a file that no other process is writing, got {path}")


def _hidden(path: Path, end: str) -> Path:
    name = path.name or path.resolve().name
    if len(os.fsencode(name)) > _LONGEST:
        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}{end}") if path.name else Path(f".{name}{end}")


def _leftover(path: Path) -> re.Pattern:
    return re.compile(re.escape(_hidden(path, "-").name) + r"[0-9a-f]{8}" + re.escape(UNFINISHED))


def _remove_leftovers(folder: Path, path: Path) -> None:
    ours = _leftover(path)
    for entry in os.listdir(folder):
        if ours.fullmatch(entry):
            left = folder / entry
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)
