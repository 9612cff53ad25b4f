"""Records: valid and invalid fields, error messages, and round trips through a file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion_fast import LionConfig
from lion_fast.data.records import (
    BOX_TEXT,
    MAX_LINE_BYTES,
    RESERVED,
    DataError,
    Record,
    parse_record,
    rewrite_boxes,
    write_jsonl,
)
from lion_fast.io.boxes import format_box, parse_boxes

VALID = {"image": "a.jpg", "task": "image_level", "question": "What?", "answer": "a cat"}
REGION = VALID | {
    "task": "region_level",
    "answer": "Answer: [0.250,0.100,0.500,1.000]",
    "boxes": [[0.25, 0.1, 0.5, 1]],
}

edges = st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(edges, edges).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))
text = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).filter(
    lambda t: t.strip() and not BOX_TEXT.search(t)
)


@given(text, text, st.none() | st.lists(text.filter(lambda t: "," not in t)), st.lists(boxes), st.none() | text)
def test_writing_and_reading_are_inverse(question, answer, tags, found, name) -> None:
    answer += "".join(map(format_box, found))
    record = Record(
        "a.jpg", "region_level", question, answer, None if tags is None else tuple(tags), tuple(found), name
    )
    line = record.to_json()
    assert "\n" not in line
    assert parse_record(line, "x:1") == record
    assert parse_record(line.encode(), "x:1") == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ...}, "answer: missing"),
        ({"answer": ""}, "answer: expected text, got blank text"),
        ({"question": " \n"}, "question: expected text, got blank text"),
        ({"image": 3}, "image: expected text, got the number 3"),
        ({"question": "\ud800"}, "question: expected text that UTF-8 can hold"),
        ({"task": "caption"}, "task: expected 'region_level' or 'image_level', got 'caption'"),
        ({"tags": "cat, dog"}, "tags: expected a list, got text"),
        ({"tags": ["cat", "dog, cow"]}, r"tags\[1\]: expected one tag, got several in 'dog, cow'"),
        ({"tags": [None]}, r"tags\[0\]: expected text, got null"),
        ({"boxes": [[0, 0, 1]]}, r"boxes\[0\]: expected four numbers \[x1, y1, x2, y2\], got \[0, 0, 1\]"),
        ({"boxes": [[0, 0, 1, True]]}, r"boxes\[0\]: expected four numbers"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, 20, 10]]}, r"boxes\[1\]: expected shares of width and height, 0..1, got"),
        ({"boxes": [[-0.1, 0, 1, 1]]}, r"boxes\[0\]: expected shares"),
        ({"boxes": [[0.6, 0, 0.4, 1]]}, r"boxes\[0\]: expected x1 < x2 and y1 < y2, got \[0.6, 0, 0.4, 1\]"),
        ({"boxes": [[0.6, 0, 0.6, 1]]}, r"boxes\[0\]: expected x1 < x2"),
        (
            {"boxes": [[0, 0, 10**400, 1]]},
            r"boxes\[0\]: expected shares of width and height, 0..1, got \[0, 0, an integer of 1329 bits, 1\]$",
        ),
        ({"boxes": [[0, 0, 1e999, 1]]}, "not JSON .Infinity is no JSON"),
        ({"boxes": [None]}, r"boxes\[0\]: expected a list, got null"),
        ({"boxes": [[0, 0, None, 1]]}, r"boxes\[0\]: expected four numbers"),
        (
            {"question": "Fill in a <extra_id_0> star"},
            "question: expected text without '<extra_id_0>', the token of the",
        ),
        ({"tags": ["<extra_id_0>"]}, r"tags\[0\]: expected text without '<extra_id_0>'"),
        ({"a\nb" * 60: 1}, r"a\\nba.*: no such field"),
        ({"answer": "x" * MAX_LINE_BYTES}, "expected at most 1048576 bytes in a line, got a record of 1048"),
        ({"boxes": [0.1, 0.2, 0.3, 0.4]}, r"boxes\[0\]: expected a list, got the number 0.1"),
        ({"box": [0, 0, 1, 1]}, "box: no such field; expected image, task, question, answer, tags, boxes, id, source"),
        ({"id": 7}, "id: expected text, got the number 7"),
        (REGION | {"boxes": []}, r"answer: expected the text of one of the boxes \[\], got \[0.250,0.100"),
        (REGION | {"boxes": [[0.2, 0.1, 0.5, 1]]}, r"answer: expected the text of one of the boxes \['\[0.200,"),
    ],
)
def test_invalid_fields_are_rejected(change: dict[str, Any], message: str) -> None:
    fields = {name: value for name, value in (VALID | change).items() if value is not ...}
    with pytest.raises(DataError, match=f"^train.jsonl:7: {message}"):
        parse_record(json.dumps(fields), "train.jsonl:7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"image": NaN}', "not JSON .NaN is no JSON"),
        ('{"image": 1e999}', "image: expected text|task: missing"),
        ('{"image": ' + "1" * 5000 + "}", "not JSON .Exceeds the limit"),
        ('{"image": "\\ud800", "task": 1, "question": 1, "answer": 1}', "image: expected text that UTF-8 can hold"),
        (
            '{"image": "a", "image": "b", "task": 1, "question": 1, "answer": 1}',
            "image: .* got several values under one name",
        ),
        (json.dumps(VALID).encode("utf-16"), "not JSON .expected UTF-8, got UTF-16"),
        ("[]", "expected a JSON object, got a list"),
        ("null", "expected a JSON object, got null"),
    ],
)
def test_lines_that_are_no_records_are_rejected(line: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^x:1: {message}"):
        parse_record(line, "x:1")


def test_the_reserved_token_is_the_soft_prompts() -> None:
    assert LionConfig().soft_prompt_token == RESERVED


def test_a_byte_order_mark_is_dropped() -> None:
    line = json.dumps(VALID)
    assert (
        parse_record("\ufeff" + line, "x:1") == parse_record(b"\xef\xbb\xbf" + line.encode(), "x:1") == Record(**VALID)
    )


def test_the_longest_line_that_can_be_read_can_be_written(tmp_path: Path) -> None:
    """A record has no more bytes than a line that `JsonlDataset` reads, its newline included."""
    rest = len(Record(**VALID).to_json()) - len("a cat") + 1
    record = Record(**VALID | {"answer": "\1" + "é" * ((MAX_LINE_BYTES - rest - 6) // 2)})
    size = len(record.to_json().encode()) + 1
    assert MAX_LINE_BYTES - 1 <= size <= MAX_LINE_BYTES
    with pytest.raises(ValueError, match="expected at most 1048576 bytes in a line"):
        Record(**VALID | {"answer": record.answer + "é"})


def test_a_region_level_record_is_accepted() -> None:
    record = parse_record(json.dumps(REGION), "x:1")
    assert parse_boxes(record.answer) == [list(record.boxes[0])]
    assert asdict(record)["tags"] is None


@given(st.lists(boxes, min_size=1, max_size=4), st.data())
def test_the_text_of_all_boxes_is_rewritten_in_one_pass(before, data) -> None:
    """Two boxes can exchange their positions."""
    after = data.draw(st.permutations(before))
    distinct = list({format_box(box): (box, new) for box, new in zip(before, after, strict=True)}.values())
    old, new = zip(*distinct, strict=True)
    sentence = " and ".join(map(format_box, old)) + " but not [1,2] or [0.5,0.5,0.6,0.6]"
    expected = " and ".join(map(format_box, new)) + " but not [1,2] or [0.5,0.5,0.6,0.6]"
    assert rewrite_boxes(sentence, old, new) == expected


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "train.jsonl"
    record = Record(**VALID)
    assert write_jsonl([record, record], path) == 2
    before = path.read_bytes()

    def fails():
        yield record
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_jsonl(fails(), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
