"""`JsonlDataset`: samples, malformed files with and without `strict`, workers."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lion_fast.data import DataError, JsonlDataset, TrainingOrder, make_loader
from lion_fast.data.dataset import MAX_LINE_BYTES
from lion_fast.scenes import SceneGenerator, write_scenes

REGION = {"task": "region_level", "answer": "[0.000,0.000,0.500,1.000]", "boxes": [[0, 0, 0.5, 1]]}


def as_they_are(samples: list) -> list:
    return samples


def test_a_sample_has_the_fields_of_its_line(images: Path, write_lines) -> None:
    path = write_lines(
        {"tags": ["red", "wall"], "id": "17"}, "", {"image": "b.png"} | REGION, b"  ", {"image": "c.png"}
    )
    dataset = JsonlDataset(path)
    assert len(dataset) == 3
    sample = dataset[0]
    assert (sample.pop("image").getpixel((0, 0)), sample) == (
        (255, 0, 0),
        {
            "task": "image_level",
            "question": "What?",
            "answer": "a cat",
            "tags": ["red", "wall"],
            "boxes": [],
            "id": "17",
            "place": f"{path}:1",
        },
    )
    sample = dataset[1]
    assert (sample["task"], sample["tags"], sample["boxes"]) == ("region_level", None, [[0, 0, 0.5, 1]])
    assert sample["place"] == f"{path}:3"
    assert dataset[-1]["place"] == f"{path}:5"
    assert [dataset.record(i).image for i in range(3)] == ["a.png", "b.png", "c.png"]
    with pytest.raises(IndexError):
        dataset[3]


def test_image_paths_are_relative_to_the_file_or_the_root(images: Path, write_lines, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = write_lines({}, {"image": str(images / "b.png")}, name="lists/train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl:1: image \(.*lists/a.png\): expected an image file"):
        JsonlDataset(path)[0]
    dataset = JsonlDataset(path, image_root=images)
    assert [dataset[i]["image"].getpixel((0, 0)) for i in range(2)] == [(255, 0, 0), (0, 128, 0)]


def test_one_task_can_be_selected(images: Path, write_lines) -> None:
    path = write_lines({}, {"image": "b.png"} | REGION, {"image": "c.png"})
    assert [JsonlDataset(path, task="image_level").place(i) for i in range(2)] == [f"{path}:1", f"{path}:3"]
    regions = JsonlDataset(path, task="region_level")
    assert (len(regions), regions[0]["place"], regions.tasks.tolist()) == (1, f"{path}:2", [0])
    with pytest.raises(ValueError, match="task: expected 'region_level' or 'image_level', or None for both, got 'rec'"):
        JsonlDataset(path, task="rec")
    with pytest.raises(DataError, match=r"images.jsonl: holds no sample of task region_level$"):
        JsonlDataset(write_lines({}, name="images.jsonl"), task="region_level")


def test_the_tagger_tags_records_without_tags(images: Path, write_lines) -> None:
    path = write_lines({"tags": ["wall"]}, {"image": "b.png"}, {"image": "c.png", "tags": []})
    dataset = JsonlDataset(path, tagger=lambda image: (str(image.getpixel((0, 0))),))
    assert [dataset[i]["tags"] for i in range(3)] == [["wall"], ["(0, 128, 0)"], []]


def test_scenes_are_written_to_files(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "scenes", 3, seed=5, image_size=48)
    dataset = JsonlDataset(path)
    generator = SceneGenerator(5, 48)
    samples = [(scene, sample) for scene in (generator[i] for i in range(3)) for sample in scene.samples()]
    assert len(dataset) == len(samples)
    for i, (scene, sample) in enumerate(samples):
        read = dataset[i]
        assert read["image"].tobytes() == scene.image.tobytes()
        assert (read["task"], read["question"], read["answer"]) == (sample.task, sample.text, sample.answer)
        assert read["tags"] == list(scene.tags)
        assert read["boxes"] == ([] if sample.box is None else [list(sample.box)])
    only = JsonlDataset(write_scenes(tmp_path / "rec", 2, seed=5, image_size=48, kinds=["rec"]))
    assert all("-rec-" in str(only.record(i).id) for i in range(len(only)))
    with pytest.raises(ValueError, match="kinds: expected some of caption, vqa, rec, reg, got dance"):
        write_scenes(tmp_path / "x", 2, seed=5, kinds=["dance"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answer": ""}, "answer: expected text, got blank text"),
        ("{", "not JSON"),
        (b"\x00\xff" * 100, "not JSON"),
        (b"[" * (2 * MAX_LINE_BYTES + 10), "expected at most 1048576 bytes in a line"),
        (b"x" * (MAX_LINE_BYTES - 1), "not JSON"),
        (b"x" * MAX_LINE_BYTES, "expected at most 1048576 bytes in a line"),
    ],
)
def test_a_bad_line_raises_or_is_skipped(
    images: Path, write_lines, caplog: pytest.LogCaptureFixture, bad, message: str
) -> None:
    path = write_lines({}, bad, {"image": "b.png"})
    with pytest.raises(DataError, match=f"train.jsonl:2: {message}"):
        JsonlDataset(path)
    dataset = JsonlDataset(path, strict=False)
    assert [dataset[i]["place"] for i in range(len(dataset))] == [f"{path}:1", f"{path}:3"]
    assert dataset.num_bad_lines == 1
    assert f"skipped {path}:2: " in caplog.text


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the size of each read from files opened by a `Path`."""
    sizes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer) -> int:
            sizes.append(super().readinto(buffer))
            return sizes[-1]

    def opened(self: Path, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(Counted(self))

    monkeypatch.setattr(Path, "open", opened)
    return sizes


def test_a_file_of_ten_gigabytes_stops_at_the_first_bad_line(write_lines, request: pytest.FixtureRequest) -> None:
    """The file is sparse; the strict reader reads the first line and no more than a buffer."""
    path = write_lines("bad")
    with path.open("r+b") as file:
        file.truncate(10 << 30)
    sizes = request.getfixturevalue("bytes_read")
    with pytest.raises(DataError, match=r"train.jsonl:1: not JSON"):
        JsonlDataset(path)
    assert 0 < sum(sizes) < 1 << 20


def test_a_file_of_bad_lines_is_counted(write_lines, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = write_lines(*["bad"] * 2000, name="many.jsonl")
    with pytest.raises(DataError, match=r"many.jsonl: holds no sample; the first error: .*many.jsonl:1: not JSON"):
        JsonlDataset(many, strict=False)
    assert "2000 lines skipped in all" in caplog.text
    assert caplog.text.count("skipped ") == 11
    with pytest.raises(DataError, match=r"empty.jsonl: holds no sample$"):
        JsonlDataset(write_lines(name="empty.jsonl"))
    with pytest.raises(FileNotFoundError, match="path: expected a file of JSON lines"):
        JsonlDataset(tmp_path)


@pytest.mark.parametrize("bad", ["missing.png", "cut.jpg", "train.jsonl"])
def test_a_bad_image_raises_or_is_replaced_by_the_next_sample_of_its_task(
    images: Path, write_lines, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    path = write_lines({}, {"image": bad}, {"image": "b.png"} | REGION, {"image": "c.png"})
    with pytest.raises(DataError, match=f"train.jsonl:2: image .*{bad}.*: expected a"):
        JsonlDataset(path)[1]
    dataset = JsonlDataset(path, strict=False)
    for _ in range(2):
        assert [dataset[i]["place"] for i in range(4)] == [f"{path}:{line}" for line in (1, 4, 3, 4)]
    assert dataset.num_bad_images == 1
    assert caplog.text.count("skipped") == 1


def test_a_task_without_readable_images_is_an_error(images: Path, write_lines) -> None:
    dataset = JsonlDataset(write_lines({}, {"image": "missing.png"} | REGION), strict=False)
    with pytest.raises(DataError, match=r"train.jsonl:2: neither this nor any other region_level sample is readable"):
        dataset[1]


def test_a_byte_order_mark_is_dropped_and_other_encodings_are_refused(images: Path, write_lines) -> None:
    path = write_lines(b"\xef\xbb\xbf", {}, {"image": "b.png"})
    assert len(JsonlDataset(path)) == 2
    path.write_bytes(path.read_bytes().replace(b"\xef\xbb\xbf\n", b"\xef\xbb\xbf"))
    assert JsonlDataset(path)[0]["place"] == f"{path}:1"
    path.write_bytes(path.read_text(encoding="utf-8-sig").encode("utf-16"))
    with pytest.raises(DataError, match=r"train.jsonl: expected UTF-8, got UTF-16$"):
        JsonlDataset(path, strict=False)


def test_what_a_model_does_not_take_is_skipped_like_a_bad_image(images: Path, write_lines) -> None:
    path = write_lines({}, {"question": "What is <odd>?"}, {"image": "b.png"})

    def accepts(record) -> None:
        if "<odd>" in record.question:
            raise ValueError("text: does not fit")

    dataset = JsonlDataset(path)
    dataset.accepts = accepts
    with pytest.raises(DataError, match=r"train.jsonl:2: text: does not fit"):
        dataset[1]
    dataset = JsonlDataset(path, strict=False)
    dataset.accepts = accepts
    assert [dataset[i]["place"] for i in range(3)] == [f"{path}:1", f"{path}:3", f"{path}:3"]
    assert dataset.num_bad_images == 1


def test_a_line_changed_after_indexing_is_an_error(images: Path, write_lines) -> None:
    path = write_lines({}, {"image": "b.png"})
    dataset = JsonlDataset(path)
    write_lines({"question": "Which?"}, {"image": "b.png"})
    with pytest.raises(DataError, match=r"train.jsonl:2: not JSON"):
        dataset[1]


def test_workers_give_the_same_samples_and_report_bad_images(images: Path, write_lines) -> None:
    path = write_lines(*[{"image": name} for name in ("a.png", "missing.png", "b.png", "c.png", "cut.jpg", "d.png")])
    dataset = JsonlDataset(path, strict=False)
    for num_workers in (0, 2):
        loader = make_loader(TrainingOrder({"a": dataset}, steps=3, batch_size=2), as_they_are, num_workers=num_workers)
        places = [sample["place"] for batch in loader for sample in batch]
        if num_workers == 0:
            alone = places
            dataset._bad.zero_()
    assert places == alone
    assert dataset.num_bad_images == 2
    order = TrainingOrder({"a": JsonlDataset(path)}, steps=3, batch_size=2)
    strict = make_loader(order, as_they_are, num_workers=1)
    with pytest.raises(DataError, match=r"train.jsonl:[25]: image"):
        list(strict)
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(np.asarray(again[5]["image"]), np.asarray(dataset[5]["image"]))


def test_16_bit_and_rotated_images_are_read_upright(tmp_path: Path, write_lines) -> None:
    """Boxes are fractions of the upright image, after the rotation of its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert JsonlDataset(write_lines({"image": "turned.jpg"}))[0]["image"].size == (20, 30)
