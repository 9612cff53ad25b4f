"""Folders and patterns as inputs of bulk jobs."""

import glob
import os
import random
import socket
from pathlib import Path

from lion_fast.inference.bulk.items import printable
from tests.campaign.bulk_inputs import Row, check_rows, job, read
from tests.campaign.mutating import png
from tests.campaign.running import Trial

FOLDERS = ("", "a", "a/b", "z", ".hidden", "__MACOSX", "x.tar", "d.png", "[x]", "a b", "é", "\udcff")
NAMES = (
    "0.png",
    "1.PNG",
    "2.jpg",
    "._0.png",
    ".DS_Store",
    "Thumbs.db",
    "n\nl.png",
    "\udcff.png",
    "\\udcff.png",
    "[0].png",
    "*.png",
    "e\u0301.png",
    "é.png",
    "x.txt",
    "png",
)
PATTERNS = (
    "**/*.png",
    "**",
    "*",
    "*/*.png",
    "**/**/*.png",
    "**/*/**/*/**/*.png",
    "[0-9].png",
    "**/.*",
    "*/../*.png",
    "./*.png",
    "a/**/*",
    "{0}/x",
    "[",
    "*" * 500,
    "**/" * 50 + "*",
    "?.png",
    "a/b/../**/*.png",
    "absent/**",
    "*/",
    "**/\udcff*",
)
STRAY = ("s.tar", "s.zip", "s.jsonl", "s.parquet", "S.TAR")


def make(rng: random.Random, folder: Path) -> Trial:
    root = folder / "in"
    outside = folder / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "o.png").write_bytes(png((5, 5, 5)))
    description = []
    made = [root]
    root.mkdir()
    for _ in range(rng.randrange(1, 9)):
        parent = rng.choice(made)
        kind = rng.choice(["file", "file", "file", "folder", "folder", "link", "fifo", "socket", "stray"])
        try:
            if kind == "folder":
                made.append(parent / rng.choice(FOLDERS[1:]))
                made[-1].mkdir()
            elif kind == "link":
                target = rng.choice(
                    [
                        ".",
                        "..",
                        str(root),
                        str(outside),
                        "../outside",
                        "absent",
                        "loop",
                        "/dev/zero",
                        "/dev/stdin",
                        "0.png",
                        str(rng.choice(made)),
                    ]
                )
                os.symlink(target, parent / rng.choice(["loop", "l.png", "l.tar", "more", "m.jsonl", *FOLDERS[1:]]))
                kind += f" to {target}"
            elif kind == "fifo":
                os.mkfifo(parent / rng.choice(["f.png", "f.tar", "f.jsonl", "f"]))
            elif kind == "socket":
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(str(parent / "s.png"))
            elif kind == "stray":
                (parent / rng.choice(STRAY)).write_bytes(rng.choice([b"", b"PK", b"{}\n"]))
            else:
                (parent / rng.choice(NAMES)).write_bytes(png((1, 2, 3)))
        except OSError:
            continue
        description.append(kind)
    made = [path for path in made if path.is_dir()]
    whole = rng.random() < 0.5
    given = (
        str(root)
        if whole
        else rng.choice(
            [f"{root}/{rng.choice(PATTERNS)}", str(rng.choice(made) / rng.choice(NAMES)), f"{root}/**/*.png"]
        )
    )
    if rng.random() < 0.03:
        given = rng.choice(["", "\0", "x" * 5000, "\n", "**/\0"])
    expected = real_images(root) if whole else None
    globbed: set[str] | None = None
    if (
        not whole
        and given.startswith(str(root))
        and "__MACOSX" not in given
        and not os.path.isfile(given)
        and not any(kind.startswith("link") for kind in description)
    ):
        globbed = {name for name in glob.glob(given, recursive=True) if not os.path.isdir(name)}

    def check(rows: list[Row]) -> None:
        check_rows(rows)
        if expected is not None and not any(row["id"].split("/")[0].lower().endswith(".tar") for row in rows):
            found = {row["id"] for row in rows if row["error"] is None}
            assert expected <= found, f"without {sorted(expected - found)}"

        if globbed is not None and not any(name.lower().endswith((".tar", ".jsonl")) for name in globbed):
            found = {row["id"] for row in rows}
            assert found == {printable(name) for name in globbed if "__MACOSX" not in name.split("/")}, globbed

    return Trial(f"{given[:200]!r}: {description}", lambda: read(job("caption", given)), ["input", str(folder)], check)


def real_images(root: Path) -> set[str]:
    """Return the ids of the images that can be reached without a link."""
    found = set()
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found |= {
            str(path.relative_to(root)) for path in paths if path.suffix.lower() in (".png", ".jpg") and path.is_file()
        }
    return {name.encode("utf-8", "backslashreplace").decode() for name in found}
