"""Malformed files of every format, and options; `test_docs` has a well-formed example of each format."""

import contextlib
import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from lion_fast.data import FORMATS, Conversion, DataError
from lion_fast.io.boxes import format_box

COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "one"},
        {"id": 11, "image_id": 2, "caption": "two"},
        {"id": 12, "image_id": 1, "caption": "three"},
    ],
}
KARPATHY = {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"sentid": 1, "raw": "one"}]}]}
TEXTCAPS = {"data": [{"caption_id": 1, "image_id": "ab", "set_name": "train", "caption_str": "one"}]}
QUESTIONS = {"data_subtype": "train2014", "questions": [{"question_id": 5, "image_id": 1, "question": "What?"}]}
ANSWERS = {"annotations": [{"question_id": 5, "answers": [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}]}]}
AOKVQA = [{"split": "train", "image_id": 1, "question_id": "x", "question": "What?", "direct_answers": ["a"]}]
GQA = {"07": {"imageId": "n1", "question": "What?", "answer": "a"}}
OCR = {"b1": {"imageURL": "http://x/1.png", "split": 1, "questions": ["Who?"], "answers": ["She"]}}
REFS = [{"ann_id": 3, "image_id": 1, "split": "train", "sentences": [{"sent_id": 0, "sent": "the dog"}]}]
INSTANCES = {
    "images": [{"id": 1, "file_name": "1.jpg", "width": 100, "height": 50}],
    "annotations": [{"id": 3, "bbox": [10, 5, 20, 10]}],
}
MDETR = {
    "images": [{"id": 0, "file_name": "1.jpg", "width": "100", "height": "50", "caption": "the dog"}],
    "annotations": [{"image_id": 0, "bbox": [10.0, 5.0, 20.0, 10.0]}],
}
REGIONS = [
    {"regions": [{"region_id": 1, "image_id": 1, "x": 10, "y": 5, "width": 20, "height": 10, "phrase": "a dog"}]}
]
UNIT = {"x": 0, "y": 0, "width": 1, "height": 1}
IMAGE_DATA = [{"image_id": 1, "width": 100, "height": 50, "url": "https://x/VG_100K/1.jpg"}]

VALID: dict[str, list[Any]] = {
    "coco-captions": [COCO],
    "karpathy": [KARPATHY],
    "textcaps": [TEXTCAPS],
    "flickr30k": ["1.jpg#0\tone\n\n2.jpg#1\ttwo\n"],
    "vqav2": [QUESTIONS, ANSWERS],
    "okvqa": [QUESTIONS, ANSWERS],
    "aokvqa": [AOKVQA],
    "gqa": [GQA],
    "ocr-vqa": [OCR],
    "refcoco": [REFS, INSTANCES],
    "mdetr": [MDETR],
    "visual-genome": [REGIONS, IMAGE_DATA],
}
REMOVED = object()


@pytest.fixture
def write_files(tmp_path: Path):
    """Write a format's files, with the value at the end of `way` replaced or removed in one of them."""

    def write(format: str, number: int = 0, way: tuple = (), value: Any = None) -> list[Path]:
        contents = copy.deepcopy(VALID[format])
        if way:
            at = contents[number]
            for step in way[:-1]:
                at = at[step]
            if value is REMOVED:
                del at[way[-1]]
            else:
                at[way[-1]] = value
        elif value is not None:
            contents[number] = value
        paths = [tmp_path / f"{name}.data" for name in "ab"[: len(contents)]]
        for path, content in zip(paths, contents, strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return paths

    return write


def test_every_format_is_tested() -> None:
    assert set(VALID) == set(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_records_name_their_source_and_are_deterministic(format: str, write_files) -> None:
    conversion = Conversion(format, write_files(format))
    records = list(conversion)
    assert records == list(conversion)
    assert {record.source for record in records} == {format}
    assert len({record.id for record in records}) == len(records)


@pytest.mark.parametrize(
    ("format", "number", "way", "value", "message"),
    [
        ("coco-captions", 0, ("annotations", 1, "caption"), "  ", r"annotations\[1\].caption: expected text, got"),
        ("coco-captions", 0, ("annotations", 1, "caption"), None, r"a.data: annotations\[1\].caption: .* got null"),
        ("coco-captions", 0, ("annotations", 1, "caption"), REMOVED, r"a.data: annotations\[1\].caption: missing"),
        ("coco-captions", 0, ("annotations", 0, "image_id"), 9, r"annotations\[0\].image_id: .* of the file, got 9"),
        ("coco-captions", 0, ("annotations",), REMOVED, "a.data: annotations: missing"),
        ("coco-captions", 0, ("annotations",), {}, "a.data: annotations: expected a list, got an object"),
        ("coco-captions", 0, ("images", 0, "id"), 1.5, r"images\[0\].id: expected a whole number"),
        ("coco-captions", 0, (), [1], "a.data: expected an object, got a list"),
        ("coco-captions", 0, (), "{", r"a.data: not JSON \("),
        ("coco-captions", 0, (), {"images": [], "annotations": []}, "a.data: contains no record"),
        ("karpathy", 0, ("images", 0, "split"), REMOVED, r"images\[0\].split: missing"),
        ("karpathy", 0, ("images", 0, "sentences", 0, "raw"), 7, r"images\[0\].sentences\[0\].raw: expected text"),
        ("textcaps", 0, ("data", 0, "caption_str"), REMOVED, r"data\[0\].caption_str: missing"),
        ("flickr30k", 0, (), "1.jpg#0 one\n", r"a.data: line 1: expected IMAGE#NUMBER, .* '1.jpg#0 one'"),
        ("flickr30k", 0, (), "1.jpg#0\tone\n\n2.jpg#0\t \n", "a.data: line 3: expected text, got blank text"),
        ("vqav2", 0, ("questions", 0, "question"), "", r"a.data: questions\[0\].question: expected text"),
        ("vqav2", 1, ("annotations", 0, "question_id"), 6, r"b.data: annotations\[0\].question_id: .* got 6"),
        ("okvqa", 1, ("annotations", 0, "answers"), [], r"b.data: annotations\[0\].answers: expected at least"),
        ("aokvqa", 0, (0, "direct_answers"), "a", r"a.data: \[0\].direct_answers: expected a list, got text"),
        ("gqa", 0, ("07", "answer"), REMOVED, "a.data: 07.answer: missing"),
        ("gqa", 0, ("07",), 3, "a.data: 07: expected an object, got the number 3"),
        ("ocr-vqa", 0, ("b1", "split"), 4, "b1.split: expected 1, 2 or 3, got the number 4"),
        ("ocr-vqa", 0, ("b1", "answers"), [], r"b1.answers: expected one per question \(1\), got 0"),
        ("refcoco", 0, (0, "ann_id"), 4, r"a.data: \[0\].ann_id: .* got 4"),
        ("refcoco", 1, ("annotations", 0, "bbox"), [1, 2, 3], r"b.data: annotations\[0\].bbox: expected four .* got 3"),
        ("refcoco", 1, ("annotations", 0, "bbox", 2), "w", r"annotations\[0\].bbox\[2\]: expected a number, got text"),
        ("refcoco", 1, ("annotations", 0, "bbox", 2), -3, r"b.data: annotations\[0\].bbox: expected a box with"),
        ("refcoco", 1, ("images", 0, "width"), 0, r"b.data: images\[0\]: expected an image with pixels, got 0 x 50"),
        ("refcoco", 1, ("annotations", 0, "bbox"), [0.1, 0.2, 0.5, 1], r"bbox: expected a box in pixels, got sh"),
        ("visual-genome", 0, (0, "regions", 0), {**REGIONS[0]["regions"][0], **UNIT}, r"\[0\]: expected a box in pix"),
        ("mdetr", 0, ("annotations", 0, "image_id"), 9, r"annotations\[0\].image_id: .* of the file, got 9"),
        ("mdetr", 0, ("annotations",), [], r"images\[0\].id: expected one annotation .* got 0"),
        ("visual-genome", 0, (0, "regions", 0, "width"), 0, r"a.data: \[0\].regions\[0\]: expected a box with"),
        ("visual-genome", 1, (0, "url"), REMOVED, r"b.data: \[0\].url: missing"),
        ("visual-genome", 1, (0, "url"), "https://x/1.jpg", r"\[0\].url: expected an address that ends in a directory"),
        ("visual-genome", 0, (0, "id"), 2, r"\[0\].image_id: expected 2, as .*a.data: \[0\].id says"),
        ("visual-genome", 0, (0, "regions", 0, "x"), 10**400, r"\[0\].x: expected a finite number, got the .* of 401"),
        ("refcoco", 1, ("annotations", 0, "bbox", 2), math.nan, r"bbox\[2\]: expected a finite number, .* nan"),
        ("refcoco", 1, ("images", 0, "width"), 10**400, r"images\[0\]: expected an image with pixels, got 1000"),
        ("refcoco", 1, ("annotations", 0, "image_id"), 2, r"image_id: expected 1, as .*: \[0\].image_id says, got 2"),
        ("vqav2", 1, ("annotations", 0, "image_id"), 3, r"b.data: annotations\[0\].image_id: expected 1, as .*, got 3"),
    ],
)  # fmt: skip
def test_errors_name_file_entry_and_field(format, number, way, value, message, write_files) -> None:
    with pytest.raises(DataError, match=message):
        list(Conversion(format, write_files(format, number, way, value)))


def test_an_invalid_entry_can_be_skipped(write_files, caplog: pytest.LogCaptureFixture) -> None:
    files = write_files("coco-captions", 0, ("annotations", 1, "image_id"), 7)
    conversion = Conversion("coco-captions", files, strict=False)
    assert [record.answer for record in conversion] == ["one", "three"]
    assert conversion.num_bad == 1
    assert "annotations[1].image_id" in caplog.text


@pytest.mark.parametrize(
    ("format", "number", "way", "message"),
    [
        ("coco-captions", 0, ("images",), r"\[2\].id: expected an id of its own, got 1, the id of images\[0\]"),
        ("coco-captions", 0, ("annotations",), r"annotations\[3\]: .* got '10', the id of annotations\[0\]"),
        ("karpathy", 0, ("images", 0, "sentences"), r"\[1\]: .* got '1', the id of images\[0\].sentences\[0\]"),
        ("karpathy", 0, ("images",), r"images\[1\].sentences\[0\]: .* the id of images\[0\].sentences\[0\]"),
        ("textcaps", 0, ("data",), r"data\[1\]: .* the id of data\[0\]"),
        ("vqav2", 0, ("questions",), r"a.data: questions\[1\].question_id: .* the id of questions\[0\]"),
        ("okvqa", 1, ("annotations",), r"b.data: annotations\[1\]: .* the id of annotations\[0\]"),
        ("aokvqa", 0, (), r"a.data: \[1\]: .* got 'x', the id of \[0\]"),
        ("refcoco", 0, (), r"a.data: \[1\].sentences\[0\]: .* the id of \[0\].sentences\[0\]"),
        ("refcoco", 1, ("images",), r"b.data: images\[1\].id: .* the id of images\[0\]"),
        ("refcoco", 1, ("annotations",), r"b.data: annotations\[1\].id: .* the id of annotations\[0\]"),
        ("mdetr", 0, ("images",), r"a.data: images\[1\]: .* the id of images\[0\]"),
        ("mdetr", 0, ("annotations",), r"images\[0\].id: .* got 2, annotations\[0\].bbox and annotations\[1\]"),
        ("visual-genome", 0, (), r"a.data: \[1\].regions\[0\]: .* the id of \[0\].regions\[0\]"),
        ("visual-genome", 1, (), r"b.data: \[1\].image_id: .* the id of \[0\]"),
    ],
)  # fmt: skip
def test_an_id_that_two_entries_have_is_refused(format, number, way, message, write_files) -> None:
    content = copy.deepcopy(VALID[format][number])
    entries = content
    for step in way:
        entries = entries[step]
    entries.append(entries[0])
    files = write_files(format, number, (), content)
    with pytest.raises(DataError, match=message):
        list(Conversion(format, files))
    conversion = Conversion(format, files, strict=False)
    with contextlib.suppress(DataError):  # there is no record, if the only image or question is ambiguous
        records = list(conversion)
        assert len({record.id for record in records}) == len(records)
    assert conversion.num_bad >= 1


def test_an_image_id_of_two_images_is_nobodys(write_files) -> None:
    content = copy.deepcopy(COCO)
    content["images"].append({"id": 1, "file_name": "cat.jpg"})
    conversion = Conversion("coco-captions", write_files("coco-captions", 0, (), content), strict=False)
    assert [(record.image, record.answer) for record in conversion] == [("2.jpg", "two")]
    assert conversion.num_bad == 3


@pytest.mark.parametrize(("format", "name"), [("gqa", "07"), ("ocr-vqa", "b1")])
def test_a_name_that_an_object_has_twice_is_refused(format: str, name: str, write_files) -> None:
    (path,) = write_files(format)
    content = path.read_text()
    other = content.replace(name, "other", 1)
    path.write_text(f"{content[:-1]}, {content[1:-1]}, {other[1:]}")
    with pytest.raises(DataError, match=f"a.data: {name}: expected an object, got several values under one name"):
        list(Conversion(format, [path]))
    conversion = Conversion(format, [path], strict=False)
    assert [record.id.split("-")[0] for record in conversion] == ["other"]
    assert conversion.num_bad == 1


def test_an_invalid_sentence_is_skipped_alone(write_files) -> None:
    sentences = [{"sentid": 1, "raw": "one"}, {"sentid": 2, "raw": " "}, {"sentid": 3, "raw": "three"}]
    karpathy = Conversion("karpathy", write_files("karpathy", 0, ("images", 0, "sentences"), sentences), strict=False)
    assert [record.answer for record in karpathy] == ["one", "three"]
    assert karpathy.num_bad == 1
    with pytest.raises(DataError, match=r"images\[0\].sentences\[1\].raw: expected text, got blank text"):
        list(Conversion("karpathy", karpathy.files))
    sentences = [{"sent_id": 0, "sent": None}, {"sent_id": 1, "sent": "the dog"}]
    refcoco = Conversion("refcoco", write_files("refcoco", 0, (0, "sentences"), sentences), strict=False)
    assert [record.id for record in refcoco] == ["1-rec", "1-reg"]
    book = {**OCR["b1"], "questions": ["Who?", "", "What?"], "answers": ["She", "x", "That"]}
    ocr = Conversion("ocr-vqa", write_files("ocr-vqa", 0, ("b1",), book), strict=False)
    assert [(record.id, record.answer) for record in ocr] == [("b1-0", "She"), ("b1-2", "That")]
    assert ocr.num_bad == refcoco.num_bad == 1


def test_a_line_that_is_not_utf8_is_skipped_alone(write_files) -> None:
    (path,) = write_files("flickr30k")
    path.write_bytes(b"\xef\xbb\xbf1.jpg#0\tone\r\n2.jpg#0\t\xff\r\n3.jpg#0\tthree\r\n")
    with pytest.raises(DataError, match=r"a.data: line 2: expected text, got a value that cannot be read"):
        list(Conversion("flickr30k", [path]))
    records = list(Conversion("flickr30k", [path], strict=False))
    assert [(record.image, record.answer) for record in records] == [("1.jpg", "one"), ("3.jpg", "three")]
    path.write_bytes("1.jpg#0\tone".encode("utf-16"))
    with pytest.raises(DataError, match=r"a.data: expected UTF-8, got UTF-16"):
        list(Conversion("flickr30k", [path]))


def test_a_byte_order_mark_is_dropped_from_json(write_files) -> None:
    (path,) = write_files("karpathy")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [record.answer for record in Conversion("karpathy", [path])] == ["one"]
    path.write_bytes(path.read_bytes().decode("utf-8-sig").encode("utf-32"))
    with pytest.raises(DataError, match=r"a.data: not JSON .expected UTF-8, got UTF-32"):
        list(Conversion("karpathy", [path]))


def test_a_number_of_any_size_is_an_error_of_its_entry(write_files) -> None:
    (path,) = write_files("coco-captions")
    path.write_text(path.read_text().replace('"id": 11', f'"id": {"9" * 5000}').replace('"id": 12', '"id": 1e999'))
    conversion = Conversion("coco-captions", [path], strict=False)
    assert [record.answer for record in conversion] == ["one"]
    assert conversion.num_bad == 2


def test_names_of_images_are_kept_as_they_are(write_files) -> None:
    files = write_files("coco-captions", 0, ("images", 0, "file_name"), " a  b.jpg")
    assert [record.image for record in Conversion("coco-captions", files)] == [" a  b.jpg", "2.jpg", " a  b.jpg"]


def test_a_file_of_invalid_entries_names_the_first(write_files) -> None:
    files = write_files("refcoco", 1, ("annotations", 0, "bbox", 0), 10**400)
    with pytest.raises(
        DataError, match=r"a.data: contains no record; the first error: .*b.data: .*bbox\[0\]: expected a"
    ):
        list(Conversion("refcoco", files, strict=False))


def test_a_split_without_entries_is_refused(write_files) -> None:
    with pytest.raises(DataError, match=r"a.data: contains no record in val$"):
        list(Conversion("karpathy", write_files("karpathy"), splits=["train", "val"]))


@pytest.mark.parametrize(
    "template",
    ["{image_id:99999999999}", "{image_id.__class__}", "{image_id[0]}", "{image_id!r}", "{image_id:{image_id}}"],
)
def test_a_template_has_only_names_and_widths(template: str, write_files) -> None:
    with pytest.raises(DataError, match="image_name: expected a template for image_id, got"):
        list(Conversion("gqa", write_files("gqa"), image_name=template))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for format in ("karpathy", "flickr30k"):
        with pytest.raises(FileNotFoundError, match=r"pipe: expected a file of .*, got a pipe, a socket or a device"):
            list(Conversion(format, [tmp_path / "pipe"]))


def test_boxes_are_clipped_to_the_image(write_files) -> None:
    files = write_files("visual-genome", 0, (0, "regions", 0, "x"), -10)
    rec, reg = Conversion("visual-genome", files)
    assert rec.boxes == reg.boxes == ((0.0, 0.1, 0.1, 0.3),)
    assert rec.answer == format_box(rec.boxes[0])
    assert format_box(rec.boxes[0]) in reg.question


def test_options_select_splits_kinds_and_names(write_files) -> None:
    files = write_files("refcoco")
    assert [record.id for record in Conversion("refcoco", files, kinds=["reg"])] == ["0-reg"]
    assert [record.image for record in Conversion("refcoco", files, images="coco")] == ["coco/1.jpg"] * 2
    with pytest.raises(DataError, match="contains no record in testA, val"):
        list(Conversion("refcoco", files, splits=["val", "testA"]))
    named = Conversion("vqav2", write_files("vqav2"), image_name="{image_id:012d}.jpg")
    assert [(record.image, record.answer) for record in named] == [("000000000001.jpg", "b")]
    asked = {
        record.question for seed in range(40) for record in Conversion("karpathy", write_files("karpathy"), seed=seed)
    }
    assert len(asked) > 3


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("coco", {}, "format: expected one of coco-captions, .* got 'coco'"),
        ("vqav2", {"files": ["a"]}, "files: expected questions.json and annotations.json for vqav2, got 1 files"),
        ("karpathy", {"image_name": "{image_id}"}, "image_name: expected none, because karpathy contains the names"),
        ("gqa", {"image_name": "{image_id:05d}"}, r"a.data: 07: image_name: expected a template for image_id, got"),
        ("gqa", {"image_name": "{number}"}, r"a.data: 07: image_name: expected a template for image_id, got"),
        ("gqa", {"splits": ["train"]}, "splits: expected none, because gqa has a file for each, got train"),
        ("gqa", {"kinds": ["rec"]}, "kinds: expected none, because gqa has no regions, got rec"),
        ("mdetr", {"kinds": ["vqa"]}, "kinds: expected rec, reg or both, got vqa"),
    ],
)
def test_unsupported_options_are_rejected(format: str, options: dict[str, Any], message: str, write_files) -> None:
    files = write_files(format) if format in VALID else []
    with pytest.raises(ValueError, match=message):
        list(Conversion(format, **{"files": files, **options}))


def test_an_absolute_name_does_not_replace_the_folder_of_the_images(write_files) -> None:
    files = write_files("coco-captions", 0, ("images", 0, "file_name"), "/data/1.jpg")
    assert next(iter(Conversion("coco-captions", files))).image == "/data/1.jpg"
    with pytest.raises(
        DataError, match=r"annotations\[0\]: images: expected names .* within photos, got '/data/1.jpg'"
    ):
        list(Conversion("coco-captions", files, images="photos"))
    skipping = Conversion("coco-captions", files, images="photos", strict=False)
    assert [record.image for record in skipping] == ["photos/2.jpg"]
    assert skipping.num_bad == 2
