"""Reading any input of a bulk job: every item is one or has an error of one line."""

import json
from pathlib import Path
from typing import Any

from lion_fast.inference.bulk import BulkJob
from lion_fast.inference.bulk.preparing import Preparer
from lion_fast.inference.bulk.sources import open_source

Row = dict[str, Any]


def read(job: BulkJob) -> list[Row]:
    """Return the rows of a job without a model: `size` of the image, the text and the tags, or the error."""
    source: Any = open_source(job)
    rows: list[Row] = []
    for index in range(len(source)):
        found: list[Any] = []

        def encode(images: Any, items: Any, found: list[Any] = found) -> dict[str, Any]:
            found.extend(zip(images, items, strict=True))
            return {}

        (row,) = Preparer(job, source, encode, lambda image: image)([index]).rows
        rows += [{**row, "pixel": image.getpixel((0, 0)), "text": item.text} for image, item in found[:1]] or [row]
    return rows


def check_rows(rows: list[Row]) -> None:
    ids = [str(row["id"]) for row in rows]
    assert len(set(ids)) == len(ids), "an id twice"
    for row in rows:
        json.dumps({**row, "text": None}, ensure_ascii=False).encode("utf-8")
        if row["error"] is not None:
            assert "\n" not in row["error"], row["error"]
            assert len(row["error"]) <= 1000, f"an error of {len(row['error'])} characters"


def job(command: str, input: Path | str, **settings: Any) -> BulkJob:
    return BulkJob(command, str(input), "out.jsonl", "model", **settings)
