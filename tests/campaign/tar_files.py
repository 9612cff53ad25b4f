"""Tar files as inputs of bulk jobs."""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

from tests.campaign.bulk_inputs import Row, check_rows, job, read
from tests.campaign.mutating import mutate_bytes, mutate_json, png
from tests.campaign.running import Trial

NAMES = (
    "x.png",
    "x.jpg",
    "x.v1.png",
    "sub/x.png",
    "./0.png",
    "0.jpg",
    "0.json",
    "0.v2.json",
    "._0.png",
    "__MACOSX/._0.png",
    ".hidden/a.png",
    "../out.png",
    "/abs.png",
    "a//b.png",
    "a/./b.png",
    "a/../0.png",
    "n\nl.png",
    "é.png",
    "e\u0301.png",
    "\udcff.png",
    "\\udcff.png",
    "x" * 120 + ".png",
    "y" * 300 + ".png",
    "y" * 3000 + ".png",
    ".png",
    "png",
    "a.PNG",
    "a.png.json",
    "a.tar",
    "Thumbs.db",
    ".DS_Store",
)
TYPES = (b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"x", b"g", b"L", b"K", b"Z", b"D", b"V")
PAX = (
    {"path": "0.png"},
    {"size": "-512"},
    {"size": "99999999999999"},
    {"size": "x"},
    {"linkpath": "../x"},
    {"mtime": "nan"},
    {"comment": "c" * 5000},
    {"GNU.sparse.map": "0,10", "GNU.sparse.size": "99999999999"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    {"path": "\0"},
    {"hdrcharset": "BINARY"},
)


def make(rng: random.Random, folder: Path) -> Trial:
    path = folder / "t.tar"
    file = io.BytesIO()
    format = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.PAX_FORMAT])
    odd: list[str] = []
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for number in range(3):
            add(tar, f"{number}.png", png((number, 0, 0)))
            fields = mutate_json({"question": f"What{number}?"}, rng, 1 if number == 2 and rng.random() < 0.5 else 0)
            add(tar, f"{number}.json", fields.encode("utf-8", "surrogatepass"))
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            odd.append(add_odd(tar, rng))
    content = file.getvalue()
    changed = rng.random() < 0.4
    if changed:
        content = damage(content, rng) if rng.random() < 0.5 else mutate_bytes(content, rng)
    path.write_bytes(content)
    command = rng.choice(["ask", "caption", "tag"])

    def check(rows: list[Row]) -> None:
        check_rows(rows)
        if not changed and "global" not in odd:
            for number in range(2):
                (row,) = [row for row in rows if row["id"] == f"t.tar/{number}.png"]
                assert row["error"] is None, row
                assert row["pixel"] == (number, 0, 0), row
                assert row["text"] == (f"What{number}?" if command == "ask" else None), row

    return Trial(f"{command} {odd} {changed}"[:400], lambda: read(job(command, path)), [str(path)], check)


def add(tar: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def add_odd(tar: tarfile.TarFile, rng: random.Random) -> str:
    """Add an unusual member, and return its description."""
    name = rng.choice(NAMES)
    kind = rng.choice(["file", "file", "hard", "symbolic", "special", "pax", "global"])
    before = tar.offset
    try:
        if kind == "file":
            add(
                tar,
                name,
                png((7, 7, 7))
                if rng.random() < 0.7
                else rng.choice([b"", b"{}", json.dumps({"question": "Q"}).encode()]),
            )
        elif kind in ("hard", "symbolic"):
            target = rng.choice(
                ["0.png", "1.json", "../0.png", "/etc/passwd", name, "link.png", "", "a" * 300, "sub/../0.png"]
            )
            link = rng.choice(["link.png", "link2.png", "link.json", name])
            add(tar, link, b"", type=tarfile.LNKTYPE if kind == "hard" else tarfile.SYMTYPE, linkname=target)
        elif kind == "special":
            add(tar, f"s{rng.randrange(9)}.png", b"", type=rng.choice(TYPES))
        elif kind == "pax":
            add(tar, f"p{rng.randrange(9)}.png", png((8, 8, 8)), pax_headers=rng.choice(PAX))
        else:
            tar.fileobj.write(tarfile.TarInfo.create_pax_global_header(rng.choice(PAX)))  # type: ignore[union-attr]
            tar.offset = tar.fileobj.tell()  # type: ignore[union-attr]
    except (ValueError, UnicodeError):  # this format cannot hold it
        tar.fileobj.seek(before)  # type: ignore[union-attr]
        tar.offset = before
        return "none"
    return kind if kind == "global" else f"{kind} {name[:40]!r}"


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change a field of a header, with a correct checksum."""
    block = 512 * rng.randrange(len(content) // 512 or 1)
    header = bytearray(content[block : block + 512])
    start, size = rng.choice([(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    value = rng.choice(
        [
            b"\xff" * size,
            b"\x80" + b"\0" * (size - 1),
            b"7" * size,
            b"\0" * size,
            rng.randbytes(size),
            rng.choice(TYPES),
            b"-1",
        ]
    )
    header[start : start + size] = value[:size].ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:block] + bytes(header) + content[block + 512 :]
