"""Whose an output is: decided before anything of it is opened for writing, by one process at a time."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lion_fast.inference.bulk.job import BulkJob, expect_same_settings, record_of, recorded_settings
from lion_fast.inference.bulk.outputs import JOURNAL_SUFFIX, PART, Output
from lion_fast.io.atomic import write_json
from lion_fast.io.owning import made_directories, sole_writer


@contextmanager
def claimed(job: BulkJob, output: Output, settings: dict[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Own a job's output: hold its lock, make sure that its content is this job's, record the settings, and settle it.

    Args:
        settings: the settings to record, or to compare with the recorded ones.
        overwrite: whether an output that is not this job's is replaced; this job's own is always resumed.

    Raises:
        OutputInUseError: another run is writing the output.
        ValueError: the output has content and was started with other settings, or not by a job.
        OSError: it cannot be written.
    """
    record = record_of(job)
    recorded = record.exists()
    with made_directories(output.path.parent), sole_writer(Path(os.path.realpath(output.path))):
        was_there, existed = os.path.lexists(output.path), output.holds_anything()
        try:
            if existed:
                expect_same_settings(job, settings)
                output.expect_own()
            else:
                recorded_settings(record)  # what is not a record is not replaced
        except ValueError:
            if not overwrite:
                raise
            output.remove()
            existed = False
        if not existed:
            write_json(record, settings)
        try:
            output.settle()
            yield
        except BaseException:
            if not existed and not output.holds_anything():
                if not recorded:
                    record.unlink(missing_ok=True)
                if not was_there:
                    output.remove()
            raise


def expect_output_elsewhere(job: BulkJob, tables: Sequence[Path]) -> None:
    """Check that a job does not read what it writes, now or when it is resumed.

    Args:
        tables: files of an input that is not images.

    Raises:
        ValueError: an input file is the output or in it, under any name, or the pattern of the input matches it.
    """
    out = Path(job.out)
    parts = [out / PART.format(0), out / JOURNAL_SUFFIX.format(0)] if out.suffix == ".parquet" else []
    for name in (out, record_of(job), *parts):
        if not os.path.exists(job.input) and _matches(job.input, name):
            raise ValueError(f"input: expected a pattern that leaves out the output {out}, got {job.input}")
    existing = [path for path in (out, *out.glob("*")) if path.is_file()] if out.exists() else []
    inodes = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, existing)}
    real = os.path.realpath(out)
    for path in tables:
        found = os.stat(path) if inodes else None
        same = found is not None and (found.st_dev, found.st_ino) in inodes
        if same or Path(os.path.realpath(path)).is_relative_to(real):
            raise ValueError(f"input: expected files other than the output {out}, got {path}")


def _matches(pattern: str, path: Path) -> bool:
    """Return whether `glob.glob(pattern, recursive=True)` finds the path, or would if it existed."""
    parts = Path(os.path.abspath(pattern)).parts
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    wanted = (*Path(os.path.realpath(Path(*parts[:fixed]))).parts, *parts[fixed:])
    real = Path(os.path.realpath(path.absolute().parent), path.name)
    return _match(wanted, real.parts)


def _match(patterns: Sequence[str], parts: Sequence[str]) -> bool:
    if not patterns or not parts:
        return not parts and all(pattern == "**" for pattern in patterns)
    first, hidden = patterns[0], parts[0].startswith(".")
    if first == "**":
        return _match(patterns[1:], parts) or (not hidden and _match(patterns, parts[1:]))
    fits = fnmatchcase(parts[0], first) and (not hidden or first.startswith("."))
    return fits and _match(patterns[1:], parts[1:])
