"""Number of image files of the tests' jobs, and the content of the corrupt ones; the rows of their outputs."""

from pathlib import Path
from typing import Any

from lion_fast.inference.bulk.outputs import read_rows
from tests.extras import needs

COUNT = 120
CORRUPT = {"pictures/00017.png": b"no picture", "pictures/sub/00090.png": b""}


def rows_in(path: Path | str) -> list[dict[str, Any]]:
    if Path(path).is_dir():
        return needs("pyarrow.parquet", "parquet").read_table(path).to_pylist()
    return list(read_rows(Path(path)))


def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["id"])
