"""Atomic checkpoints: each is complete or absent, whatever interrupts the writing.

A directory is written under `.aside`, sealed with a list of its files (sizes and SHA-256), synced to disk and then
renamed. The next run removes whatever a killed or failed run left under `.aside`. Resuming uses the newest checkpoint
whose files match its list.

Several processes write into one directory on a shared file system; the first process seals and renames it.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from lion_fast.io.atomic import remove_directory, whole_directory, write_json
from lion_fast.io.checkpoints import cannot_be_written, is_about_files, naming_output
from lion_fast.io.reading import opened, read_content

SEAL = "complete.json"
ASIDE = ".aside"
_NAME = re.compile(r"checkpoint-([0-9]+)")
_MAX_SEAL_BYTES = 16 << 20
logger = logging.getLogger(__name__)


@contextmanager
def written_aside(
    target: Path, *, first: bool = True, wait_for_all: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Provide a directory to write into, which becomes `target` once it is synced to disk.

    Args:
        target: directory to create; replaced if it exists.
        first: whether this process seals and renames the directory.
        wait_for_all: barrier over all processes that write.

    Yields:
        The directory under `.aside`, with the name of `target`.

    Raises:
        OSError: the directory could not be written, for example to a full disk; `target` is unchanged.
    """
    aside = target.parent / ASIDE / target.name
    with (
        failing_with_os_error(target),
        whole_directory(target, aside=aside, finish=seal, first=first, wait_for_all=wait_for_all),
    ):
        yield aside


@contextmanager
def failing_with_os_error(target: Path) -> Iterator[None]:
    """Turn the errors of writing a model or a checkpoint into an OSError that names it.

    Distributed checkpoints raise errors of their own on a full disk, as the writers of `naming_output` do.
    """
    try:
        with naming_output(target):
            yield
    except CheckpointException as error:
        about_files = next((cause for cause, _ in error.failures.values() if is_about_files(cause)), None)
        if about_files is None:
            raise
        raise cannot_be_written(target, about_files) from error


def seal(directory: Path) -> None:
    """Write a list of a directory's files with sizes and digests to `complete.json`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SEAL)
    files = {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _digest(path)} for path in paths}
    write_json(directory / SEAL, files)


def damage(directory: Path) -> str | None:
    """Return the first difference between a directory and its seal, or None if it is undamaged."""
    if not (directory / SEAL).is_file():
        return f"{SEAL} is missing"
    try:
        files = _sealed(directory / SEAL)
        for name, (size, digest) in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _digest(path) != digest:
                return f"{name} does not hold what was written"
    except OSError as error:
        return f"{Path(str(error.filename or directory)).name} cannot be read ({error.strerror or error})"
    except ValueError as error:
        return f"{SEAL} cannot be read ({error})"
    return None


def _sealed(file: Path) -> dict[str, tuple[int, str]]:
    """Return the files of a seal with their sizes and digests.

    Raises:
        ValueError: the seal is not one.
    """
    if file.stat().st_size > _MAX_SEAL_BYTES:
        raise ValueError(f"over {_MAX_SEAL_BYTES} bytes")
    try:
        listed = json.loads(read_content(file))
        files = {name: (marks["size"], marks["sha256"]) for name, marks in listed.items()}
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a list of files with sizes and digests") from error
    if not files or any(os.path.isabs(name) or ".." in Path(name).parts for name in files):
        raise ValueError("not a list of files in its directory")
    return files


def entries(run_dir: Path) -> list[Path]:
    """Return what is named as a checkpoint, newest first, whether it is one or not."""
    found = [(int(match[1]), path) for path in run_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the directories named as checkpoints, newest first."""
    return [path for path in entries(run_dir) if path.is_dir()]


def last_complete(run_dir: Path) -> Path | None:
    """Return the newest undamaged checkpoint, and log a warning for each newer, damaged one."""
    for path in checkpoints(run_dir):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s); falling back to the checkpoint before it", path, problem)
    return None


def keep_newest(run_dir: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints."""
    for path in checkpoints(run_dir)[count:]:
        remove(path)


def remove(directory: Path) -> None:
    """Remove a directory if it exists, atomically: its name never refers to a part of it. Of a link, only the link."""
    if directory.is_symlink():
        directory.unlink()
    else:
        remove_directory(directory, directory.parent / ASIDE / f"{directory.name}.removed")


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to `damaged-NAME`, where it is in nobody's way and can still be looked at."""
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    target = next(to for end in names if not os.path.lexists(to := path.with_name(f"damaged-{path.name}{end}")))
    logger.warning("%s is renamed to %s", path, target.name)
    path.rename(target)


def clear_aside(run_dir: Path) -> None:
    """Remove everything that an earlier run left unfinished."""
    if (run_dir / ASIDE).is_symlink():
        (run_dir / ASIDE).unlink()
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)


def _digest(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
