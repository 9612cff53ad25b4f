"""The inputs: one per image file, line, row or tar member, with a stable id."""

import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lion_fast.data import JsonlDataset, write_shards
from lion_fast.inference.bulk.items import Item, Source
from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.preparing import Preparer
from lion_fast.inference.bulk.sources import open_source
from lion_fast.io.images import load_image
from tests.extras import needs

COLORS = ("red", "green", "blue", "white", "black")
Open = Callable[..., Source]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write `a.png` to `e.png` below `photos`, in two directories."""
    monkeypatch.chdir(tmp_path)
    Path("photos/more").mkdir(parents=True)
    for name, color in zip("abcde", COLORS, strict=True):
        Image.new("RGB", (8, 6), color).save(Path("photos", "more" if name > "c" else "", f"{name}.png"))
    Path("photos/readme.txt").write_text("no picture")
    Path("photos/.hidden.png").write_text("no picture")
    return tmp_path


def names() -> list[str]:
    return ["a.png", "b.png", "c.png", "more/d.png", "more/e.png"]


def open_job(input: str, command: str = "caption", **settings: Any) -> Source:
    return open_source(BulkJob(command, input, "out.jsonl", "model", **settings))


def colors(source: Source) -> list[tuple]:
    source = pickle.loads(pickle.dumps(source))  # as for the workers
    return [load_image(source[index].image).getpixel((0, 0)) for index in range(len(source))]


EXPECTED = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]


def ids(source: Source) -> list[str]:
    return [source.id(index) for index in range(len(source))]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.usefixtures("root")
def test_image_files() -> None:
    folder = open_job("photos")
    assert ids(folder) == names()
    assert colors(folder) == EXPECTED
    assert open_job("photos/")[3].name == "more/d.png"
    assert ids(open_job("photos/**/*.png")) == [f"photos/{name}" for name in names()]
    assert ids(open_job("photos/[ab].png")) == ["photos/a.png", "photos/b.png"]
    assert ids(open_job("photos/more/d.png")) == ["photos/more/d.png"]
    assert open_job("photos").lengths.tolist() == [0] * 5


@pytest.mark.usefixtures("root")
def test_a_file_name_that_is_not_utf8_has_a_printable_id() -> None:
    os.rename(b"photos/a.png", b"photos/\xff.png")
    source = open_job("photos")
    assert ids(source)[-1] == r"\udcff.png"
    assert colors(source)[-1] == (255, 0, 0)


def test_lines(root: Path) -> None:
    lines = [
        json.dumps({"image": name, "question": "What?" + "?" * n, "tags": ["a", "b"]}) for n, name in enumerate(names())
    ]
    lines[1:1] = ["", "   "]
    Path("photos/t.jsonl").write_text("\n".join(lines))
    source = open_job("photos/t.jsonl", "ask")
    assert ids(source) == ["t.jsonl:1", "t.jsonl:4", "t.jsonl:5", "t.jsonl:6", "t.jsonl:7"]
    assert colors(source) == EXPECTED
    assert source[1] == Item(Path("photos/b.png"), "b.png", "What??", ("a", "b"))
    assert source.lengths.tolist() == [11, 12, 13, 14, 15]
    one = open_job("photos/t.jsonl", "ask", text="Why?", tags="c")
    assert one[1] == Item(Path("photos/b.png"), "b.png")
    assert one.lengths.tolist() == [0] * 5
    Path("t.jsonl").write_bytes(Path("photos/t.jsonl").read_bytes().replace(b"question", b"q"))
    moved = open_job("*.jsonl", "ask", columns={"question": "q"}, image_root=str(root / "photos"))
    assert colors(moved) == EXPECTED
    assert ids(moved) == ids(source)


@pytest.mark.usefixtures("root")
def test_invalid_lines_are_inputs_with_an_error() -> None:
    lines = [
        {"image": "photos/a.png", "question": "What?"},
        "{",
        [1],
        {"question": "What?"},
        {"image": "photos/a.png", "question": " "},
        {"image": "photos/a.png", "question": "What?", "tags": [1]},
        {"image": "photos/absent.png", "question": "What?"},
        {"image": "x" * (1 << 20)},
        {"image": "photos/a.png", "question": "Fails?"},
        {"image": "photos/b.png", "question": "What?"},
    ]
    Path("t.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    job = BulkJob("ask", "t.jsonl", "out.jsonl", "model")

    def encode(images: list, items: list[Item]) -> dict:
        for item in items:
            if item.text == "Fails?":
                raise ValueError("does not fit")
        return {"count": len(items)}

    prepared = Preparer(job, open_source(job), encode, lambda image: image)(range(len(lines)))
    assert [row["id"] for row in prepared.rows] == [f"t.jsonl:{n}" for n in range(1, 11)]
    errors = [row["error"] for row in prepared.rows]
    assert errors[0] is None
    assert errors[1].startswith("not JSON")
    assert errors[2] == "expected a JSON object, got a list"
    assert errors[3] == "image: expected an image, got nothing"
    assert errors[4] == "question: expected text, got blank text"
    assert errors[5] == "tags: expected text or a list of texts, got a list"
    assert "absent.png" in errors[6]
    assert "bytes in a line" in errors[7]
    assert errors[8:] == ["does not fit", None]
    assert prepared.inputs == {"count": 2}
    assert len(prepared.sizes) == 2
    assert [row["question"] for row in prepared.rows][6:] == ["What?", None, "Fails?", "What?"]


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("kind", ["paths", "bytes", "structs"])
def test_parquet(kind: str) -> None:
    pa, pq = needs("pyarrow", "parquet"), needs("pyarrow.parquet", "parquet")
    contents = [Path("photos", name).read_bytes() for name in names()]
    structs = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]
    structs[4] = {"bytes": None, "path": "photos/more/e.png"}
    images = {"paths": [f"photos/{name}" for name in names()], "bytes": contents, "structs": structs}[kind]
    table = pa.table({"jpg": images, "question": [f"What{'?' * n}" for n in range(5)], "other": [1] * 5})
    pq.write_table(table.slice(0, 3), "1.parquet", row_group_size=2)
    pq.write_table(table.slice(3), "2.parquet")
    source = open_job("*.parquet", "ask", columns={"image": "jpg"})
    assert ids(source) == ["1.parquet:0", "1.parquet:1", "1.parquet:2", "2.parquet:0", "2.parquet:1"]
    assert colors(source) == EXPECTED
    assert source.lengths.tolist() == [4, 5, 6, 7, 8]
    assert [source[4].text, source[1].text] == ["What????", "What?"]
    assert source[3].name == {"paths": "photos/more/d.png", "bytes": None, "structs": "3.png"}[kind]
    with pytest.raises(ValueError, match=r"1.parquet: expected a column 'image', got jpg, question, other"):
        open_job("*.parquet")
    Path("1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"1.parquet: not a readable Parquet file"):
        open_job("*.parquet", columns={"image": "jpg"})


@pytest.mark.usefixtures("root")
def test_shards() -> None:
    Path("shards").mkdir()
    contents = {name: Path("photos", name).read_bytes() for name in names()}
    first = {"a.png": contents["a.png"], "a.json": b'{"question": "Why?"}', "a.txt": b"a caption"}
    write_tar(Path("shards/0.tar"), first | {"b.png": contents["b.png"], "b.json": b"{", "c.png": contents["c.png"]})
    write_tar(Path("shards/1.tar"), {name: contents[name] for name in names()[3:]})
    source = open_job("shards")
    assert ids(source) == ["0.tar/a.png", "0.tar/b.png", "0.tar/c.png", "1.tar/more/d.png", "1.tar/more/e.png"]
    assert colors(open_job("shards", tags="x")) == EXPECTED
    asked = open_job("shards/0.tar", "ask")
    assert (asked[0].text, asked.lengths.tolist()) == ("Why?", [4, 0, 0])
    with pytest.raises(ValueError, match=r"the .json of the image is not JSON"):
        asked[1]
    with pytest.raises(ValueError, match="question: missing"):
        asked[2]
    with pytest.raises(ValueError, match=r"question: expected one for all images, or a .json with a field"):
        open_job("shards/1.tar", "ask")
    whole = Path("shards/0.tar").read_bytes()
    Path("shards/0.tar").write_bytes(whole[: 512 + len(contents["a.png"]) // 2])
    with pytest.raises(ValueError, match=r"0.tar: not a complete, uncompressed tar file"):
        open_job("shards")
    write_tar(Path("shards/0.tar"), {"a.png": contents["a.png"]})
    with tarfile.open("shards/0.tar", "a") as tar:
        tar.add("photos/b.png", "a.png")
    with pytest.raises(ValueError, match=r"expected every name once, got a.png twice"):
        open_job("shards")


@pytest.mark.usefixtures("root")
def test_shards_of_training_data() -> None:
    record = {"task": "image_level", "question": "What?", "answer": "a"}
    Path("t.jsonl").write_text("".join(json.dumps({"image": f"photos/{name}", **record}) + "\n" for name in names()))
    write_shards(JsonlDataset("t.jsonl"), "shards")
    source = open_job("shards")
    assert sorted(colors(source)) == sorted(EXPECTED)
    assert ids(source)[0] == "shard-000000.tar/000000000.png"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("input", "command", "error", "message"),
    [
        ("absent/*.png", "tag", FileNotFoundError, r"input: expected a file, .* pattern .* got absent/\*.png"),
        ("empty", "tag", FileNotFoundError, r"expected images \(or .tar files\) in the directory empty, found none"),
        ("photos/[at].*", "tag", ValueError, "expected files of one kind, got .jsonl, images"),
        ("photos/t.jsonl", "tag", ValueError, "expected lines with 'image', got none in t.jsonl; .* have picture"),
        ("photos", "ask", ValueError, "question: expected one for all images"),
    ],
)
def test_errors_name_the_input(input: str, command: str, error: type[Exception], message: str) -> None:
    Path("empty").mkdir()
    Path("photos/t.jsonl").write_text('{"picture": "a.png"}\n')
    with pytest.raises(error, match=message):
        open_job(input, command)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("input", "settings", "message"),
    [
        ("photos", {"columns": {"id": "n"}}, "columns: expected none for id, because image files have no fields"),
        ("photos/*.png", {"columns": {"tags": "t"}}, "columns: expected none for tags, because image files have no"),
        ("photos", {"image_root": "photos"}, "image_root: expected none without a table, .* got photos"),
        ("t.tar", {"image_root": "photos"}, "image_root: expected none without a table, .* got photos"),
        ("t.tar", {"columns": {"image": "jpg"}}, "columns: expected none for image, because shards contain their"),
        ("t.tar", {"columns": {"id": "n"}}, "n: expected a .json with a field of that name for each image, got none"),
    ],
)
def test_an_option_that_the_input_has_no_use_for_is_refused(input: str, settings: dict, message: str) -> None:
    write_tar(Path("t.tar"), {"a.png": Path("photos/a.png").read_bytes()})
    with pytest.raises(ValueError, match=message):
        open_job(input, **settings)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.jsonl.gz", "t.tar.zst", "t.zip", "*.tsv", "t"])
def test_a_file_of_another_kind_is_no_image(name: str) -> None:
    Path(name.replace("*", "t")).write_bytes(b"image,id\na.png,1\n")
    with pytest.raises(ValueError, match=r"input: expected an image, a .jsonl, .parquet or .tar file, or a directory"):
        open_job(name)


@pytest.mark.usefixtures("root")
def test_an_image_needs_no_suffix() -> None:
    os.rename("photos/a.png", "photos/a")
    os.rename("photos/b.png", "photos/b.data")
    assert [colors(open_job(name)) for name in ("photos/a", "photos/b.data")] == [EXPECTED[:1], EXPECTED[1:2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": "sing"}, "command: expected caption, ask, locate, tag, got 'sing'"),
        ({"out": "rows.csv"}, "out: expected a name that ends in .jsonl or .parquet, got rows.csv"),
        ({"text": "What?"}, "text: expected none for caption, got 'What?'"),
        ({"command": "ask", "text": " "}, "question: expected words, got ' '"),
        ({"command": "tag", "tags": "dog"}, "tags: expected none for tag, which generates them, got 'dog'"),
        ({"columns": {"question": "q"}}, "columns: expected names for id, image, tags, got one for 'question'"),
        (
            {"command": "ask", "text": "What?", "columns": {"question": "q"}},
            "columns: expected none for question, because all images have the same, got one",
        ),
        ({"tags": "a", "columns": {"tags": "t"}}, "columns: expected none for tags, because all images have the same"),
    ],
)
def test_invalid_jobs_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BulkJob(**{"command": "caption", "input": "photos", "out": "rows.jsonl", "model": "model", **settings})
