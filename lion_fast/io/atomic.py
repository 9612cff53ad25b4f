"""Atomic writing: files and directories appear under their names only when they are complete and on disk.

Each is written beside its target under a hidden name of its own, flushed to disk, and only then renamed. An error
removes the unfinished copy; what a killed process left never has the target's name, and the next writer of the target
removes it.
"""

import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lion_fast.io.owning import (
    UNFINISHED,
    expect_empty,
    expect_free,
    file_behind,
    is_stream,
    naming_path,
    sole_writer,
    temporary_beside,
)

__all__ = ["UNFINISHED", "remove_directory", "to_disk", "whole_directory", "whole_file", "write_json", "write_text"]


@contextmanager
def whole_file(path: Path, *, overwrite: bool = True, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` at the end and removed after an error.

    A symbolic link stays a link, and a file that is replaced keeps its permissions. A path that is not a file, such as
    a pipe or /dev/stdout, is yielded itself, because renaming a file to it would replace it. If /dev/stdout leads to a
    file, the content is added where the file's writer is.

    Args:
        overwrite: whether a file with content is replaced.
        locked: whether the caller holds the lock of the file, `sole_writer`.

    Raises:
        OutputExistsError: there is a file with content, without `overwrite`.
        OutputInUseError: another process or thread is writing it.
        OSError: it could not be written; a file at `path` is as it was.
    """
    if is_stream(path):
        descriptor = file_behind(path)
        if descriptor is None:
            yield path
        else:
            yield from _added_to(descriptor, path)
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    expect_free(path, overwrite=overwrite)
    with nullcontext() if locked else sole_writer(target):
        unfinished = temporary_beside(target)
        try:
            with naming_path(path, unfinished):
                yield unfinished
                expect_free(path, overwrite=overwrite)  # nothing may have appeared in the meantime
                if target.exists():
                    unfinished.chmod(stat.S_IMODE(target.stat().st_mode))
                to_disk(unfinished)
                unfinished.replace(target)
                to_disk(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def _added_to(descriptor: int, path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose content is written to an open descriptor at the end."""
    with tempfile.TemporaryDirectory() as directory:
        unfinished = Path(directory) / "unfinished"
        yield unfinished
        sys.stdout.flush()  # what was printed before comes first
        with naming_path(path), unfinished.open("rb") as content, os.fdopen(os.dup(descriptor), "wb") as file:
            shutil.copyfileobj(content, file)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write a text file in UTF-8; errors as `whole_file`'s."""
    with whole_file(path, overwrite=overwrite) as unfinished, naming_path(path):
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int = 1, *, overwrite: bool = True) -> None:
    """Write a file of JSON, which ends in a newline; errors as `whole_file`'s."""
    write_text(path, json.dumps(content, indent=indent) + "\n", overwrite=overwrite)


@contextmanager
def whole_directory(
    target: Path,
    *,
    aside: Path | None = None,
    new: bool = False,
    keep_others: bool = False,
    finish: Callable[[Path], None] | None = None,
    first: bool = True,
    wait_for_all: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Yield a temporary directory, whose content moves to `target` once all of it is on disk.

    Several processes may write into it, on a file system that they share. Files get the permissions that the umask
    allows, also from writers that give access to the owner alone.

    Args:
        target: where it goes; replaced if it exists.
        aside: where it is written until then, on the disk of `target`; replaced if it exists, and the same for all
            processes. By default, for one process, a new directory beside `target`, or in it if it stays.
        new: refuse a `target` that holds anything; an empty one, which may be the working directory or a mount, stays.
        keep_others: leave an existing `target` in its place, with its other files.
        finish: called with the directory when all is written, before it is brought to the disk.
        first: whether this process is the one that finishes and renames.
        wait_for_all: a barrier over all processes that write.

    Raises:
        OutputExistsError: `target` holds something, with `new`.
        OutputInUseError: another process or thread is writing it, with `new`.
        OSError: it could not be written; a `target` that is replaced is as it was.
    """
    if target.is_symlink():
        target = target.resolve()
    if new:
        expect_empty(target)
    stays = (new or keep_others) and target.exists()
    with ExitStack() as stack:
        if aside is None:
            if not stays:
                target.parent.mkdir(parents=True, exist_ok=True)
            if new:
                stack.enter_context(sole_writer(target, inside=stays))
                expect_empty(target)  # nothing may have appeared before the lock was there
            # A name of its own: nobody's directory is in the way, and two processes with one target do not meet.
            aside = temporary_beside(target, inside=stays)
            with naming_path(target, aside):
                aside.mkdir()
        elif first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        wait_for_all()
        try:
            with naming_path(target, aside):
                yield aside
                wait_for_all()
                if first:
                    if finish is not None:
                        finish(aside)
                    _apply_umask(aside)
                    for path in (*aside.rglob("*"), aside):
                        to_disk(path)
                    _place(aside, target, stays=stays, new=new or keep_others)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        wait_for_all()


def _place(aside: Path, target: Path, *, stays: bool, new: bool) -> None:
    if stays:
        # In the order of writing: what says that all is there, such as an index, comes last.
        for path in sorted(aside.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            path.replace(target / path.name)
        aside.rmdir()
        to_disk(target)
        return
    if not new:
        remove_directory(target, aside.with_name(f"{aside.name}.removed"))
    aside.rename(target)  # refused by the kernel if something else is there now
    to_disk(target.parent)


def _apply_umask(directory: Path) -> None:
    """Give what is in a directory the permissions of new files: safetensors gives access to the owner alone."""
    mode = stat.S_IMODE(directory.stat().st_mode)  # made by this process, so 0o777 without the umask
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


def remove_directory(directory: Path, going: Path) -> None:
    """Remove a directory, if it is there, under the name `going`: at no moment does a part of it have its own."""
    if directory.exists():
        shutil.rmtree(going, ignore_errors=True)
        going.parent.mkdir(exist_ok=True)
        directory.rename(going)
        shutil.rmtree(going)


def to_disk(path: Path) -> None:
    """Bring a file's content to the disk, or the names in a folder."""
    if os.name == "nt":
        return  # there only a file that is open for writing can be
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming_path(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
