"""The files of a bulk job's input: a file, those below a folder, or those that match a pattern.

A folder and a pattern such as `folder/**/*.png` find the same files. Links are followed, to folders too. Of several
ways to one folder, one is taken: the one without links, otherwise the first in order. What operating systems put beside
files is passed over: names that begin with a dot, and `__MACOSX`.
"""

import fnmatch
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from lion_fast.inference.bulk.job import PATTERN, no_input
from lion_fast.io.images import image_suffixes
from lion_fast.io.reading import on_one_line

TABLES = (".jsonl", ".parquet")
SHARDS = ".tar"


def find_files(input: str) -> list[tuple[str, Path]]:
    """Return the files of `BulkJob.input`, sorted, each with the name that its ids start with.

    A folder's files are its `.tar` files if it has any, otherwise the images in it and below it.

    Raises:
        FileNotFoundError: no file is found.
        ValueError: the folder has both `.tar` files and images.
        OSError: the input or a folder cannot be read.
    """
    if os.path.isfile(input):
        path = Path(input)
        return [(path.name if kind_of(path) else input, path)]
    if os.path.isdir(input):
        return _files_of(Path(input))
    if os.path.lexists(input):
        with suppress(FileNotFoundError):  # a link to nothing is an image that cannot be read
            os.stat(input)
    matched = sorted({name for name in _matching(input) if not os.path.isdir(name)})
    if not matched:
        raise no_input(input)
    return [(name, Path(name)) for name in matched]


def kind_of(path: Path) -> str:
    """Return the suffix of a table or a shard in lower case, and "" for other files."""
    suffix = path.suffix.lower()
    return suffix if suffix in TABLES or suffix == SHARDS else ""


def is_hidden(name: str) -> bool:
    """Return whether a path within a folder or an archive is one that operating systems write beside files."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def _files_of(directory: Path) -> list[tuple[str, Path]]:
    shards = sorted(
        (path.name, path)
        for path in directory.iterdir()
        if kind_of(path) == SHARDS and not is_hidden(path.name) and not path.is_dir()
    )
    images = sorted(_images_below(directory))
    if shards and images:
        raise ValueError(
            f"input: expected images or .tar files in the directory {on_one_line(directory)}, got both, such as "
            f"{on_one_line(shards[0][0])} and {on_one_line(images[0][0])}; a pattern such as "
            f"{on_one_line(directory)}/*.tar chooses"
        )
    if not shards and not images:
        raise FileNotFoundError(
            f"input: expected images (or .tar files) in the directory {on_one_line(directory)}, found none"
        )
    return shards or images


def _images_below(directory: Path) -> Iterator[tuple[str, Path]]:
    suffixes = image_suffixes()
    for folder in _folders_below(str(directory)):
        for entry in _entries(folder):
            path = Path(entry.path)
            if path.suffix.lower() in suffixes and not is_hidden(entry.name) and not os.path.isdir(entry.path):
                yield path.relative_to(directory).as_posix(), path


def _folders_below(directory: str) -> Iterator[str]:
    """Return a folder and all folders below it that are not hidden, each real folder once."""
    seen: set[tuple[int, int]] = set()
    links = [directory]
    while links:
        further: list[str] = []
        for link in links:
            # The folders of a link are walked to the end, before the links that were found in them.
            folders = [link]
            while folders:
                folder = folders.pop()
                status = os.stat(folder)
                identity = status.st_dev, status.st_ino
                if identity in seen:
                    continue
                seen.add(identity)
                yield folder
                inside = [
                    entry for entry in _entries(folder) if not is_hidden(entry.name) and os.path.isdir(entry.path)
                ]
                further += [entry.path for entry in inside if entry.is_symlink()]
                folders += [entry.path for entry in reversed(inside) if not entry.is_symlink()]
        links = further


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder or ".") as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _matching(pattern: str) -> Iterable[str]:
    """Return the paths that match a pattern, with the rules of `glob.glob(pattern, recursive=True)`.

    `glob` itself follows links in circles, in time that grows exponentially with their number.
    """
    if not PATTERN & set(pattern) or pattern.endswith("/"):
        return [pattern] if os.path.lexists(pattern) else []
    parts = [part for part in pattern.split("/") if part]
    parts = [part for part, before in zip(parts, ["", *parts], strict=False) if part != "**" or before != "**"]
    return _expand("/" if pattern.startswith("/") else "", parts, set())


def _expand(base: str, parts: list[str], seen: set[tuple[str, ...]]) -> Iterator[str]:
    """Return the paths of a pattern's parts below a folder; `base` is "" or ends in a slash."""
    if (base, *parts) in seen:  # reached in several ways, if the pattern has several **
        return
    seen.add((base, *parts))
    if not parts:
        yield base[:-1]
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        if os.path.isdir(base or "."):
            for folder in _folders_below(base or "."):
                yield from _expand(_joined(base, folder), rest or ["*"], seen)
    elif not PATTERN & set(part):
        if os.path.lexists(base + part):
            yield from _expand(f"{base}{part}/", rest, seen)
    elif os.path.isdir(base or "."):
        for entry in _entries(base):
            named = not entry.name.startswith(".") or part.startswith(".")
            if named and entry.name != "__MACOSX" and fnmatch.fnmatchcase(entry.name, part):
                yield from _expand(f"{base}{entry.name}/", rest, seen)


def _joined(base: str, folder: str) -> str:
    """Return the path of a folder that was found below `base`, as a base: within ".", without that."""
    found = folder if base else folder[2:]
    return f"{found}/" if found and not found.endswith("/") else found
