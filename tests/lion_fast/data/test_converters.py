"""Malformed files of every format, and options; `test_docs` has a well-formed example of each format."""

import copy
import json
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
        ("mdetr", 0, ("annotations",), [], r"images\[0\].id: expected one annotation .* got 0"),
        ("visual-genome", 0, (0, "regions", 0, "width"), 0, r"a.data: \[0\].regions\[0\]: expected a box with"),
        ("visual-genome", 1, (0, "url"), REMOVED, r"b.data: \[0\].url: missing"),
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
