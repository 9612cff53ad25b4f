"""The inputs of a bulk job: images with stable ids and random access."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lion_fast.inference.bulk.files import SHARDS, TABLES, find_files, kind_of
from lion_fast.inference.bulk.items import Columns, Item, Source, printable
from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.shards import ShardSource
from lion_fast.inference.bulk.tables import JsonlSource, ParquetSource
from lion_fast.io.images import image_suffixes, load_image
from lion_fast.io.reading import check_regular, on_one_line


class ImageSource(Source):
    """Source of image files; their ids are their names.

    Args:
        files: name and path of each file.
    """

    def __init__(self, columns: Columns, files: Sequence[tuple[str, Path]]):
        if columns.text is not None:
            raise ValueError(
                f"{columns.text}: expected one for all images, because image files have none of their own, got none"
            )
        super().__init__(columns, np.zeros(len(files)), [])
        self._images = files

    def id(self, index: int) -> str:
        return printable(self._images[index][0])

    def __getitem__(self, index: int) -> Item:
        name, path = self._images[index]
        return Item(path, printable(name))


def open_source(job: BulkJob) -> Source:
    """Open a job's inputs.

    Raises:
        FileNotFoundError: no input file exists.
        ValueError: the files are of several kinds, or cannot be read as the kind of their suffix.
    """
    files, columns = find_files(job.input), Columns.of(job)
    image_root = None if job.image_root is None else Path(job.image_root)
    kinds = {kind_of(path): path for _, path in reversed(files)}
    if len(kinds) > 1:
        names = {kind or "images": path for kind, path in sorted(kinds.items())}
        raise ValueError(
            f"input: expected files of one kind, got {', '.join(sorted(names))} in {on_one_line(job.input)}, such as "
            f"{' and '.join(map(on_one_line, names.values()))}"
        )
    (kind,) = kinds
    _expect_used(job, kind)
    _expect_different([name for name, _ in files])
    for _, path in files if kind else ():
        check_regular(path, f"a {kind} file")
    if kind == ".jsonl":
        source: Source = JsonlSource(columns, files, image_root)
    elif kind == ".parquet":
        source = ParquetSource(columns, files, image_root)
    elif kind == SHARDS:
        source = ShardSource(columns, files)
    else:
        _expect_images(files)
        return ImageSource(columns, files)
    source.tables = [path for _, path in files]
    return source


def _expect_used(job: BulkJob, kind: str) -> None:
    """Check that the input has the fields and the paths that a job has names and a root for.

    Raises:
        ValueError: it has none.
    """
    if kind in TABLES:
        return
    what = "shards contain their images" if kind else "image files have no fields"
    for role in job.columns:
        if not kind or role == "image":
            raise ValueError(f"columns: expected none for {role}, because {what}, got {job.columns[role]!r}")
    if job.image_root is not None:
        raise ValueError(f"image_root: expected none without a table, whose paths it is for, got {job.image_root}")


def _expect_images(files: Sequence[tuple[str, Path]]) -> None:
    """Check that files without the suffix of an image are not those of another kind, such as a table.

    Raises:
        ValueError: no file has such a suffix, and the first cannot be read as an image.
    """
    if any(path.suffix.lower() in image_suffixes() for _, path in files):
        return
    try:
        load_image(files[0][1])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"input: expected an image, a .jsonl, .parquet or .tar file, or a directory of images or .tar files, got "
            f"{on_one_line(files[0][0])}"
        ) from error


def _expect_different(names: Sequence[str]) -> None:
    """Check that names which are not UTF-8 do not become equal to others when they are written in it.

    Raises:
        ValueError: two names give the same ids.
    """
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(printable(name), name)) != name:
            raise ValueError(f"input: expected files with different names in UTF-8, got {other!r} and {name!r}")
