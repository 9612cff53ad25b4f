"""Tar files: WebDataset's keys, links, what systems add, and damaged headers."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.sources import open_source
from lion_fast.io.images import load_image

RED, GREEN = (255, 0, 0), (0, 128, 0)


def png(color: tuple[int, int, int] = RED) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


def asks(question: str) -> bytes:
    return json.dumps({"question": question}).encode()


@pytest.fixture
def write(tmp_path: Path):
    """Write `t.tar` of (name, content, other fields of the header) and return its path."""

    def write(*members: Sequence[Any], **options: Any) -> Path:
        with tarfile.open(tmp_path / "t.tar", "w", **options) as tar:
            for name, content, *fields in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                for field, value in fields[0].items() if fields else ():
                    setattr(member, field, value)
                tar.addfile(member, io.BytesIO(content))
        return tmp_path / "t.tar"

    return write


def test_a_file_that_ends_between_two_members_is_truncated(write) -> None:
    path = write(("a.png", png()), ("b.png", png()))
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    os.truncate(path, second)
    with pytest.raises(ValueError, match=r"t.tar: not a complete.*ends at byte 1024 without the empty block"):
        opened(path)


def link(target: str, type: bytes = tarfile.SYMTYPE) -> tuple[bytes, dict[str, Any]]:
    return b"", {"type": type, "linkname": target}


def opened(path: Path, command: str = "caption") -> Any:
    return open_source(BulkJob(command, str(path), "out.jsonl", "model"))


def rows(source: Any) -> dict[str, Any]:
    """Return the colour of each image, or the error."""
    found = {}
    for index in range(len(source)):
        try:
            found[source.id(index).removeprefix("t.tar/")] = load_image(source[index].image).getpixel((0, 0))
        except ValueError as error:
            found[source.id(index).removeprefix("t.tar/")] = str(error)
    return found


def test_a_key_ends_at_the_first_dot_of_the_base_name(write) -> None:
    path = write(
        ("v1.0/a.b.png", png()), ("v1.0/a.json", asks("A?")), ("v1.0/c.png", png()), ("v1.0/c.x.json", asks("C?"))
    )
    source = opened(path, "ask")
    assert [source[index].text for index in range(2)] == ["A?", "C?"]


def test_a_text_of_two_images_is_ambiguous(write) -> None:
    shots = [
        (f"shot.v{n}.{kind}", png() if kind == "png" else asks(str(n))) for n in (1, 2) for kind in ("png", "json")
    ]
    with pytest.raises(
        ValueError, match=r"t.tar: expected one .json for each key .*, got 'shot.v1.json' and 'shot.v2.json'"
    ):
        opened(write(*shots), "ask")
    with pytest.raises(
        ValueError, match=r"expected one image for each key .*, got 'shot.v1.png' and 'shot.v2.png' for 'shot"
    ):
        opened(write(*shots[:3]), "ask")
    with pytest.raises(ValueError, match=r"expected one image .*, got 'a.png' and 'a.jpg' for 'a.json'"):
        opened(write(("a.png", png()), ("a.jpg", png()), ("a.json", asks("A?"))))
    assert rows(opened(write(shots[0], shots[2]))) == {"shot.v1.png": RED, "shot.v2.png": RED}


@pytest.mark.parametrize("again", ["a.png", "./a.png", "x/../a.png"])
def test_a_name_twice_is_refused(write, again: str) -> None:
    with pytest.raises(ValueError, match=rf"t.tar: not a complete.*expected every name once, got {again} twice"):
        opened(write(("a.png", png()), (again, png())))
    with pytest.raises(ValueError, match="expected different names in UTF-8"):
        opened(write(("\udcff.png", png()), ("\\udcff.png", png())))


def test_what_systems_add_is_passed_over(write) -> None:
    junk = ("._a.png", "__MACOSX/._a.png", "__MACOSX/a.png", ".a/b.png", ".DS_Store", "Thumbs.db", ".png", "./._c.png")
    assert rows(opened(write(("./a.png", png()), *((name, b"\0\5\x16\7") for name in junk)))) == {"./a.png": RED}


def test_links_are_the_members_that_they_name(write) -> None:
    path = write(
        ("data/a.png", png(GREEN)),
        ("hard.png", *link("data/a.png", tarfile.LNKTYPE)),
        ("data/soft.png", *link("a.png")),
        ("far.png", *link("./data/../data/soft.png")),
        ("out.png", *link("../../etc/passwd")),
        ("abs.png", *link("/data/a.png")),
        ("loop.png", *link("loop.png")),
        ("up.png", *link("../a.png", tarfile.LNKTYPE)),
        ("q.json", asks("Q?")),
        ("far.json", *link("q.json")),
    )
    found = rows(opened(path))
    assert {name for name, value in found.items() if value == GREEN} == {
        "data/a.png",
        "hard.png",
        "data/soft.png",
        "far.png",
    }
    for name, target in (("out", "../../etc/passwd"), ("abs", "/data/a.png"), ("loop", "loop.png"), ("up", "../a.png")):
        assert found[f"{name}.png"] == f"expected a link to a file of the archive, got one to '{target}'"
    source = opened(path, "ask")
    ids = [source.id(index) for index in range(len(source))]
    assert source[ids.index("t.tar/far.png")].text == "Q?"


def test_special_members_are_errors_of_their_rows(write) -> None:
    found = rows(
        opened(write(("a.png", png()), ("b.png", b"", {"type": tarfile.FIFOTYPE}), ("c.png", b"", {"type": b"S"})))
    )
    assert found["a.png"] == RED
    assert found["b.png"] == "expected a file, got a pipe, a device or another special member"
    assert "sparse" in found["c.png"]


def test_a_damaged_header_is_not_the_end(write) -> None:
    path = write(("a.png", png()), ("b.png", png()))
    content = bytearray(path.read_bytes())
    at = content.index(b"b.png")
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"t.tar: not a complete, uncompressed tar file \(a damaged header at byte {at}\)"
    ):
        opened(path)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"size": "-512"}, "leads back"),
        ({"size": "99999999999"}, "is truncated"),
        ({"comment": "c" * 70_000}, "says 70.* bytes"),
        ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, ""),
    ],
)
def test_hostile_extended_headers_are_refused(write, headers: dict[str, str], message: str) -> None:
    path = write(("a.png", png()), ("b.png", png(), {"pax_headers": headers}), format=tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match=rf"t.tar: not a complete, uncompressed tar file .*{message}"):
        opened(path)


def test_a_negative_size_is_refused(write) -> None:
    path = write(("a.png", png()), ("b.png", png()))
    content = bytearray(path.read_bytes())
    at = content.index(b"b.png")
    header = content[at : at + 512]
    header[124:136] = b"\xff" * 11 + b"\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[at : at + 512] = header
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a header of 'b.png' says -256 bytes"):
        opened(path)


def test_own_ids_are_handed_through(write) -> None:
    """A `.json` that is read for an id alone, and has none, is no error."""
    fields: list[dict[str, Any]] = [{"id": "mine", "n": 7}, {"id": 5}, {"n": 8}]
    members = [(f"{n}.json", json.dumps(own).encode()) for n, own in enumerate(fields)] + [("3.json", b"{")]
    path = write(*members, *((f"{n}.png", png()) for n in range(4)))

    def ids(command: str = "tag", **columns: str) -> list:
        source = open_source(BulkJob(command, str(path), "out.jsonl", "model", columns=columns))
        return [source.id(index) for index in range(len(source))]

    assert ids() == ids("caption") == ["mine", 5, "t.tar/2.png", "t.tar/3.png"]
    assert ids(id="n") == [7, "t.tar/1.png", 8, "t.tar/3.png"]
    assert ids(id="") == [f"t.tar/{n}.png" for n in range(4)]


def test_an_id_of_two_images_is_refused(write) -> None:
    path = write(*((f"{n}.png", png()) for n in range(2)), *((f"{n}.json", b'{"id": "a"}') for n in range(2)))
    with pytest.raises(ValueError, match=r"t.tar/0.png and .*t.tar/1.png: expected different ids, got 'a' twice"):
        opened(path)


def test_joined_archives_are_refused(write) -> None:
    """What follows the end of an archive, as after `cat a.tar b.tar`, is not passed over."""
    path = write(("a.png", png()))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"t.tar: not a complete, .* \(content after its end"):
        opened(path)
