"""The members of a tar file that are images or their texts, with WebDataset's rules.

A member's key is its path up to the first dot of its base name. A `.json` belongs to the image with its key, which must
then be the only one. Names that begin with a dot are passed over, as is `__MACOSX`. Links count as the member that they
name.
"""

import os
import posixpath
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lion_fast.inference.bulk.files import is_hidden
from lion_fast.io.images import image_suffixes
from lion_fast.io.reading import naming, on_one_line, shown

_TEXT = ".json"
_IMAGE_BYTES = 1 << 30  # an image within the limit of pixels takes less
_TEXT_BYTES = 64 << 20
_HEADER_BYTES = 1 << 16  # of extended headers, which hold long names


class Span(NamedTuple):
    """The bytes of a member's content; a `problem` says why it has none that can be read."""

    start: int = 0
    size: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Members:
    """The images of a tar file by name, in order, and the texts by key."""

    images: dict[str, Span]
    texts: dict[str, Span]

    def text_of(self, image: str) -> Span:
        """Return the text that belongs to an image, which is empty if it has none."""
        return self.texts.get(_key(posixpath.normpath(image)), Span())


def read_members(path: Path) -> Members:
    """Read the headers of a tar file.

    Raises:
        ValueError: it is not an uncompressed tar file, is damaged or truncated, contains the name of an image or text
            twice, or several images or texts with one key.
    """
    with naming(path, "a complete, uncompressed tar file"):
        members = _scan(path)
    suffixes = image_suffixes()
    images: dict[str, Span] = {}
    texts: dict[str, Span] = {}
    by_key: dict[str, list[str]] = {}
    text_names: dict[str, str] = {}
    for name, (raw, _) in members.items():
        if is_hidden(name):
            continue
        suffix = PurePosixPath(name).suffix.lower()
        span = _resolve(name, members)
        if suffix in suffixes:
            images[raw] = _limited(span, _IMAGE_BYTES)
            by_key.setdefault(_key(name), []).append(raw)
        elif suffix == _TEXT:
            other = text_names.setdefault(_key(name), raw)
            if other != raw:
                raise ValueError(f"{on_one_line(path)}: {_expected_one('.json')}, got {shown(other)} and {shown(raw)}")
            texts[_key(name)] = _limited(span, _TEXT_BYTES)
    for key, names in by_key.items():
        if len(names) > 1 and key in texts:
            raise ValueError(
                f"{on_one_line(path)}: {_expected_one('image')} that has a .json, got {shown(names[0])} and "
                f"{shown(names[1])} for {shown(text_names[key])}"
            )
    return Members(images, texts)


class _Header(tarfile.TarInfo):
    """A header whose size can be right: an extended one is read at once, and a negative one leads back."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        extended = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        extended |= header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if header.size < 0 or (extended and header.size > _HEADER_BYTES):
            raise ValueError(f"a header of {shown(header.name)} says {header.size} bytes")
        return header


def _scan(path: Path) -> dict[str, tuple[str, Span | str]]:
    """Return by normalised name each member's name, and its span or, for a link, the normalised name of its target."""
    members: dict[str, tuple[str, Span | str]] = {}
    size = os.path.getsize(path)
    before = -1
    tar: Any
    with tarfile.open(path, "r:", tarinfo=_Header) as tar:
        for member in tar:
            if member.offset <= before or member.size < 0:
                raise ValueError(f"the header of {shown(member.name)} leads back")
            before = member.offset
            tar.members = []  # frees the headers that the loop has seen
            if member.isdir():
                continue
            name = posixpath.normpath(member.name)
            if name in members and _is_read(name):
                raise ValueError(f"expected every name once, got {shown(member.name)[1:-1]} twice")
            if member.islnk() or member.issym():
                folder = posixpath.dirname(name) if member.issym() else ""
                members[name] = member.name, posixpath.normpath(posixpath.join(folder, member.linkname))
                continue
            span = Span(member.offset_data, member.size)
            if not member.isreg():
                span = Span(problem="expected a file, got a pipe, a device or another special member")
            elif member.issparse():
                span = Span(problem="expected a file as it is, got a sparse member")
            elif span.start + span.size > size:
                raise ValueError(f"{shown(member.name)} is truncated")
            members[name] = member.name, span
        # tarfile takes a damaged header for the end, and needs none.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if any(end):
            raise ValueError(f"a damaged header at byte {tar.offset}")
        if len(end) < tarfile.BLOCKSIZE:
            raise ValueError(f"it ends at byte {size} without the empty block that ends a tar file")
        while rest := tar.fileobj.read(1 << 20):
            if rest.count(0) < len(rest):
                raise ValueError("content after its end, as in files that were joined; extract and pack them again")
    return members


def _is_read(name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    return not is_hidden(name) and (suffix == _TEXT or suffix in image_suffixes())


def _resolve(name: str, members: Mapping[str, tuple[str, Span | str]]) -> Span:
    """Return the span of a member or, for a link, of the member that it names, directly or by other links."""
    found: Span | str = members[name][1]
    target = found
    passed: set[str] = set()
    while isinstance(found, str) and found in members and found not in passed:
        passed.add(found)
        found = members[found][1]
    if isinstance(found, Span):
        return found
    return Span(problem=f"expected a link to a file of the archive, got one to {shown(target)}")


def _limited(span: Span, limit: int) -> Span:
    return span if span.size <= limit else Span(problem=f"expected at most {limit} bytes, got {span.size}")


def _key(name: str) -> str:
    """Return a member's path up to the first dot of its base name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _expected_one(what: str) -> str:
    return f"expected one {what} for each key (a name up to its first dot)"
