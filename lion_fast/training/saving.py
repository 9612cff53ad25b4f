"""Checkpoints that are whole or not there, whatever stops the writing of them.

A directory is written under `.aside`, sealed with a list of its files (sizes and SHA-256), brought to the disk, and
only then renamed to its name. What a killed or failed run left aside is removed by the next. Who reads takes the newest
checkpoint whose files are those of its list.

Several processes write into one directory on a file system that they share; the first of them seals and renames.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from lion_fast.io.atomic import remove_directory, whole_directory, write_json

SEAL = "complete.json"
ASIDE = ".aside"
_NAME = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


@contextmanager
def written_aside(
    target: Path, *, first: bool = True, wait_for_all: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """A directory to write into, which becomes `target` when all of it is on the disk.

    Args:
        target: replaced if it exists.
        first: whether this process is the one that seals and renames.
        wait_for_all: a barrier over all processes that write.

    Yields:
        The directory, with the name of `target` in a folder aside.

    Raises:
        OSError: it could not be written, a full disk included; `target` is as it was.
    """
    aside = target.parent / ASIDE / target.name
    try:
        with whole_directory(target, aside=aside, finish=seal, first=first, wait_for_all=wait_for_all):
            yield aside
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        # torch.save, safetensors and distributed checkpoints say by errors of their own that a disk is full.
        failures = [error]
        if isinstance(error, CheckpointException):
            failures = [cause for cause, _ in error.failures.values()]
        about_files = next(filter(_is_about_files, failures), None)
        if about_files is None:
            raise
        raise OSError(f"{target}: cannot be written ({' '.join(str(about_files).split())})") from error


def _is_about_files(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in ("PytorchStreamWriter", "unexpected pos", "iostream error"))
    return isinstance(error, OSError | SafetensorError)


def seal(directory: Path) -> None:
    """List a directory's files, with sizes and digests, in `complete.json`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SEAL)
    files = {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _digest(path)} for path in paths}
    write_json(directory / SEAL, files)


def damage(directory: Path) -> str | None:
    """What keeps a directory from being the one that was sealed, or None."""
    try:
        files = json.loads((directory / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError) as error:
        return f"{SEAL} cannot be read ({error})"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _digest(path) != expected["sha256"]:
            return f"{name} does not hold what was written"
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    """The directories with the names of checkpoints, the newest first."""
    found = [(int(match[1]), path) for path in run_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def last_complete(run_dir: Path) -> Path | None:
    """The newest undamaged checkpoint; those that are passed over are named in the log."""
    for path in checkpoints(run_dir):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s); falling back to the checkpoint before it", path, problem)
    return None


def keep_newest(run_dir: Path, count: int) -> None:
    """Remove all checkpoints but the `count` newest."""
    for path in checkpoints(run_dir)[count:]:
        remove(path)


def remove(directory: Path) -> None:
    """Remove a directory, if it is there; at no moment does a part of it have its name."""
    remove_directory(directory, directory.parent / ASIDE / f"{directory.name}.removed")


def clear_aside(run_dir: Path) -> None:
    """Remove what an earlier run did not finish writing."""
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
