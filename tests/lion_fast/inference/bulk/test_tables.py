"""Tables whose rows or cells cannot be read."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.preparing import Preparer, readable
from lion_fast.inference.bulk.sources import open_source
from tests.extras import needs


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")


def texts(input: str, **settings: Any) -> list[str | None]:
    """Return the text of each row, or the error."""
    source = open_source(BulkJob("ask", input, "out.jsonl", "model", **settings))
    found: list[str | None] = []
    for index in range(len(source)):
        try:
            found.append(source[index].text)
        except ValueError as error:
            found.append(f"error: {error}")
    return found


def write_table(path: str = "t.parquet", names: list[str] | None = None, **columns: Any) -> None:
    pa, pq = needs("pyarrow", "parquet"), needs("pyarrow.parquet", "parquet")
    arrays = [pa.array(column) if isinstance(column, list) else column for column in columns.values()]
    pq.write_table(pa.Table.from_arrays(arrays, names=names or list(columns)), path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
@pytest.mark.parametrize("fault", ["removed", "truncated"])
def test_a_table_that_is_lost_ends_the_job_and_a_lost_image_does_not(name: str, fault: str) -> None:
    if name == "t.jsonl":
        Path(name).write_text('{"image": "a.png", "question": "One?"}\n' * 2)
    else:
        write_table(image=["a.png"] * 2, question=["One?"] * 2)
    job = BulkJob("ask", name, "out.jsonl", "model")
    preparer = Preparer(job, open_source(job), lambda images, items: {}, lambda image: image)
    Path("a.png").rename("moved.png")
    (lost,) = preparer([0]).rows
    assert "a.png): expected an image file, got a directory or nothing" in lost["error"]
    preparer.source = open_source(job)  # without what the source keeps of a Parquet file
    Path(name).unlink() if fault == "removed" else os.truncate(name, 9)
    with pytest.raises(OSError, match=rf"No such file.*'{name}'$|^{name}: expected \d+ bytes.*got 9$"):
        list(readable([preparer([1])]))


def test_a_cell_that_is_not_utf8_is_an_error_of_its_row() -> None:
    pa = needs("pyarrow", "parquet")
    questions = pa.array([b"One?", b"\xff", b"Three?"]).view(pa.string())
    write_table(image=["a.png"] * 3, question=questions)
    assert texts("t.parquet") == ["One?", "error: question: expected text, got a value that cannot be read", "Three?"]
    write_table(image=questions, question=["One?"] * 3)
    assert texts("t.parquet")[1:] == ["error: image: expected an image, got a value that cannot be read", "One?"]


def test_values_of_other_types_are_errors_of_their_rows() -> None:
    pa = needs("pyarrow", "parquet")
    far = pa.array([2**62, 0], pa.int64()).view(pa.timestamp("us"))
    write_table(image=["a.png"] * 2, question=far)
    unreadable, early = texts("t.parquet")
    assert unreadable == "error: question: expected text, got a value that cannot be read"
    assert early == "error: question: expected text, got a value of type datetime"
    write_table(image=["a.png"], question=pa.array([0]).view(pa.timestamp("us", "Nowhere/Land")))
    assert texts("t.parquet") == ["error: question: expected text, got a value that cannot be read"]
    write_table(image=[{"bytes": "a.png"}], question=["What?"])
    assert texts("t.parquet") == ["error: image.bytes: expected the content of an image file, got text"]
    write_table(image=pa.array(["a.png"]).cast(pa.large_string()), question=pa.array(["Q?"]).dictionary_encode())
    assert texts("t.parquet") == ["Q?"]


def test_every_error_of_a_parquet_file_names_it() -> None:
    write_table(names=["image", "question", "question"], image=["a.png"], a=["One?"], b=["Two?"])
    with pytest.raises(ValueError, match=r"^t.parquet: expected one column 'question', got 2$"):
        texts("t.parquet")
    assert texts("t.parquet", text="What?") == [None]
    write_table(image=["a.png"] * 50, question=["One?"] * 50)
    content = Path("t.parquet").read_bytes()
    for size in range(0, len(content), 50):
        Path("t.parquet").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"^t.parquet: .*not a readable Parquet file"):
            texts("t.parquet")


def test_lines_with_a_byte_order_mark_or_odd_values() -> None:
    lines = [
        '{"image": "a.png", "question": "One?", "score": NaN, "size": ' + "9" * 5000 + "}",
        '{"image": "a.png", "question": "Two?", "question": "Three?"}',
        '{"image": "a.png", "question": "\\ud800"}',
        "[" * 100_000,
    ]
    Path("t.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert texts("t.jsonl") == [
        "One?",
        "error: question: expected text, got several values under one name",
        "\ud800",
        "error: not JSON (nested too deeply)",
    ]
    Path("t.jsonl").write_text("\n".join(lines), encoding="utf-16")
    with pytest.raises(ValueError, match=r"t.jsonl: not a file of JSON lines \(expected UTF-8, got UTF-16\)"):
        texts("t.jsonl")


def test_a_message_lists_some_of_the_fields() -> None:
    Path("t.jsonl").write_text("{" + ", ".join(f'"field\\n{n}": 1' for n in range(10_000)) + "}\n")
    with pytest.raises(ValueError, match=r"columns: expected lines with 'image', got none in t.jsonl") as caught:
        texts("t.jsonl")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
