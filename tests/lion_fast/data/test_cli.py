"""`lion-fast data` with invalid input, and tags added before training; `test_docs` runs it with valid input."""

import json
from pathlib import Path

import pytest

from lion_fast.data import DataError, JsonlDataset, add_tags


def test_check_stops_or_counts(images: Path, write_lines, run_cli) -> None:
    region = {"task": "region_level", "answer": "[0.000,0.000,0.500,1.000]", "boxes": [[0, 0, 0.5, 1]]}
    path = write_lines({}, {"image": "cut.jpg"}, region, {"answer": ""}, {"image": "b.png"})
    status, out, err = run_cli("data", "check", path)
    assert (status, out) == (2, "")
    assert f"{path}:4: answer: expected text" in err
    status, out, _ = run_cli("data", "check", path, "--skip-bad")
    assert status == 0
    assert out == f"{path}: 4 samples, 1 region_level, 3 image_level; 1 invalid lines, 1 samples with a bad image\n"
    status, out, _ = run_cli("data", "shards", path, "--out", path.parent / "shards", "--skip-bad")
    assert status == 0
    assert out.endswith("3 samples in 1 shards; skipped 1 invalid lines and 1 samples with a bad image\n")


def test_convert_counts_and_leaves_no_partial_file(tmp_path: Path, run_cli) -> None:
    (tmp_path / "list.token").write_text("1.jpg#0\tone\nbad\n", encoding="utf-8")
    arguments = ["convert", "flickr30k", tmp_path / "list.token", "--out", tmp_path / "out.jsonl"]
    status, _, err = run_cli("data", *arguments)
    assert status == 2
    assert "list.token: line 2: expected IMAGE#NUMBER" in err
    assert [path.name for path in tmp_path.iterdir()] == ["list.token"]
    status, out, _ = run_cli("data", *arguments, "--skip-bad")
    assert (status, out) == (0, f"{tmp_path / 'out.jsonl'}: 1 samples; skipped 1 invalid entries\n")


def test_records_on_standard_output_are_records_alone(tmp_path: Path, run_cli) -> None:
    (tmp_path / "list.token").write_text("1.jpg#0\tone\n", encoding="utf-8")
    status, out, err = run_cli("data", "convert", "flickr30k", tmp_path / "list.token", "--out", "/dev/stdout")
    assert (status, err) == (0, "/dev/stdout: 1 samples; skipped 0 invalid entries\n")
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["1.jpg#0"]


def test_tags_are_added_once_per_image(images: Path, write_lines, tmp_path: Path) -> None:
    path = write_lines({}, {"image": "b.png", "tags": ["mine"]}, {}, {"image": "c.png"}, {"image": "cut.jpg"})
    seen = []

    def tagger(images: list) -> list[str]:
        seen.append(len(images))
        return [f"wide, {image.getpixel((0, 0))[2]}" for image in images]

    out = tmp_path / "tagged.jsonl"
    with pytest.raises(DataError, match=r"train.jsonl:5: image .*cut.jpg"):
        add_tags(JsonlDataset(path), out, tagger)
    assert add_tags(JsonlDataset(path, strict=False), out, tagger, batch_size=1) == (2, 1)
    assert seen[-2:] == [1, 1]
    tagged = JsonlDataset(out)
    assert [tagged.record(i).tags for i in range(4)] == [("wide", "0"), ("mine",), ("wide", "0"), ("wide", "255")]
    assert len(tagged) == 4
    before = out.read_bytes()
    bad = JsonlDataset(write_lines({"image": "cut.jpg"}), strict=False)
    with pytest.raises(DataError, match=r"jsonl: none of its images can be read"):
        add_tags(bad, out, tagger)
    assert out.read_bytes() == before
    path = write_lines({}, {"image": "b.png"})
    with pytest.raises(ValueError, match="out: expected a file other than the input"):
        add_tags(JsonlDataset(path), path, tagger)
    with pytest.raises(ValueError, match=r"tagger: expected one result per image \(2\), got 0"):
        add_tags(JsonlDataset(path, strict=False), out, lambda images: [])
