"""Commands that write data: nothing is replaced unasked, and two at a time never mix."""

import json
import threading
from pathlib import Path

import pytest

from lion_fast.data import Conversion, JsonlDataset, add_tags, write_jsonl, write_shards
from lion_fast.io.owning import OutputExistsError, OutputInUseError
from lion_fast.scenes import write_scenes


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps({str(n): {"imageId": str(n), "question": "a?", "answer": "b"} for n in range(3)}))
    return path


def test_convert_refuses_what_exists(tmp_path: Path, gqa: Path, run_cli) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("mine")
    status, _, err = run_cli("data", "convert", "gqa", gqa, "--out", out)
    assert (status, out.read_text()) == (2, "mine")
    assert "o.jsonl, which exists (see --overwrite)" in err
    status, _, err = run_cli("data", "convert", "gqa", gqa, "--out", out, "--overwrite")
    assert (status, len(out.read_text().splitlines())) == (0, 3), err
    before = gqa.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(gqa)
    for name in (gqa, tmp_path / "link.jsonl"):
        status, _, err = run_cli("data", "convert", "gqa", gqa, "--out", name, "--overwrite")
        assert (status, gqa.read_bytes()) == (2, before)
        assert "--out: expected a file other than the input" in err
    status, _, err = run_cli("data", "convert", "gqa", gqa, "--out", "/dev/full")
    assert status == 2
    assert "[Errno 28] No space left on device: '/dev/full'" in err


def test_of_two_conversions_the_second_stops(tmp_path: Path, gqa: Path) -> None:
    out, errors = tmp_path / "o.jsonl", []

    def second() -> None:
        try:
            write_jsonl(Conversion("gqa", [gqa]), out)
        except OutputInUseError as error:
            errors.append(str(error))

    def records():
        for number, record in enumerate(Conversion("gqa", [gqa])):
            if number == 1:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            yield record

    assert write_jsonl(records(), out) == 3
    assert errors == [f"out: expected a file that no other process is writing, got {out}"]
    assert len(out.read_text().splitlines()) == 3


def test_scenes_replace_only_the_same_scenes(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    path = write_scenes(out, 2, 0, image_size=32)
    before = path.read_bytes()
    image = out / "images" / "000001.png"
    image.write_bytes(image.read_bytes()[:20])  # a kill
    path.unlink()
    write_scenes(out, 2, 0, image_size=32)
    assert path.read_bytes() == before
    for settings in ((2, 1), (1, 0)):
        with pytest.raises(OutputExistsError, match=r"out: expected no other scenes in .* \(see --overwrite\)"):
            write_scenes(out, *settings, image_size=32)
        assert path.read_bytes() == before
    image.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"000001\.png"):
        write_scenes(out, 2, 0, image_size=32)
    assert image.read_bytes() == b"mine"
    write_scenes(out, 2, 1, image_size=32, overwrite=True)
    assert path.read_bytes() != before


def test_shards_appear_when_all_are_there(tmp_path: Path) -> None:
    dataset = JsonlDataset(write_scenes(tmp_path / "scenes", 2, 0, image_size=32))
    with pytest.raises(ValueError, match="no other process"):
        _shards_of_shards(dataset, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="out: expected an empty or new directory"):
        write_shards(dataset, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def _shards_of_shards(dataset: JsonlDataset, out: Path) -> None:
    """Start a second writer of the same shards within the first."""

    class Twice(JsonlDataset):
        def record(self, index: int):
            write_shards(dataset, out)
            return super().record(index)

    write_shards(Twice(dataset.path), out)


def test_tags_are_not_computed_for_a_file_that_exists(tmp_path: Path) -> None:
    dataset = JsonlDataset(write_scenes(tmp_path / "scenes", 1, 0, image_size=32))
    (tmp_path / "tagged.jsonl").write_text("mine")

    def tagger(images: list) -> list[str]:
        raise AssertionError("an image was tagged")

    with pytest.raises(OutputExistsError, match=r"tagged\.jsonl"):
        add_tags(dataset, tmp_path / "tagged.jsonl", tagger, overwrite=False)
    assert (tmp_path / "tagged.jsonl").read_text() == "mine"
