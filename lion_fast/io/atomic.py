"""Atomic writing: files and directories appear under their names only when they are complete and on disk.

Each is written beside its target, flushed to disk, and only then renamed. An error removes the unfinished copy, and a
copy that a killed process left never has the target's name.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

UNFINISHED = ".unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` at the end and removed after an error.

    A symbolic link stays a link. A path that is not a file, such as a pipe or /dev/stdout, is yielded itself, because
    renaming a file to it would replace it.

    Raises:
        OSError: it could not be written; a file at `path` is as it was.
    """
    linked = path.is_symlink()
    if (path.exists() and not path.is_file()) or (linked and path.is_relative_to("/dev")):
        yield path
        return
    path = path.resolve() if linked else path
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        yield unfinished
        to_disk(unfinished)
        unfinished.replace(path)
        to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; errors as `whole_file`'s."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write a file of JSON, which ends in a newline; errors as `whole_file`'s."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def whole_directory(
    target: Path,
    *,
    aside: Path | None = None,
    keep_others: bool = False,
    finish: Callable[[Path], None] | None = None,
    first: bool = True,
    wait_for_all: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Yield a temporary directory, whose content moves to `target` once all of it is on disk.

    Several processes may write into it, on a file system that they share.

    Args:
        target: where it goes; replaced if it exists.
        aside: where it is written until then, on the disk of `target`; replaced if it exists, and the same for all
            processes. By default, for one process, a new directory beside `target`, or in it if it stays.
        keep_others: leave an existing `target`, which may be the working directory or a mount, in its place, with its
            other files.
        finish: called with the directory when all is written, before it is brought to the disk.
        first: whether this process is the one that finishes and renames.
        wait_for_all: a barrier over all processes that write.

    Raises:
        OSError: it could not be written; a `target` that is replaced is as it was.
    """
    if target.is_symlink():
        target = target.resolve()
    stays = keep_others and target.exists()
    if aside is None:
        # A name of its own: nobody's directory is in the way, and two processes with one target do not meet.
        aside = (target if stays else target.parent) / f".{target.name}-{uuid4().hex[:8]}{UNFINISHED}"
        aside.mkdir(parents=True)
    elif first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    wait_for_all()
    try:
        yield aside
        wait_for_all()
        if first:
            if finish is not None:
                finish(aside)
            for path in (*aside.rglob("*"), aside):
                to_disk(path)
            if stays:
                for path in list(aside.iterdir()):
                    path.replace(target / path.name)
                aside.rmdir()
                to_disk(target)
            else:
                remove_directory(target, aside.with_name(f"{aside.name}.removed"))
                aside.rename(target)
                to_disk(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    wait_for_all()


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
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
