"""Files of JSON lines and Parquet files as inputs of bulk jobs."""

import decimal
import io
import json
import random
from pathlib import Path
from typing import Any

from tests.campaign.bulk_inputs import Row, check_rows, job, read
from tests.campaign.mutating import mutate_bytes, mutate_json, png
from tests.campaign.running import Trial


def make(rng: random.Random, folder: Path) -> Trial:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png((number, 0, 0)))
    try:
        import pyarrow as pa
    except ImportError:
        parquet = False
    else:
        parquet = pa is not None and rng.random() < 0.6
    name, content, valid = parquet_file(rng) if parquet else json_lines(rng)
    path = folder / f"{name}{'.parquet' if parquet else '.jsonl'}"
    path.write_bytes(content)
    command = rng.choice(["ask", "ask", "caption", "locate"])
    settings: dict[str, Any] = {}
    if rng.random() < 0.1:
        role = "question" if command == "ask" else "image"
        settings["columns"] = {
            role: rng.choice(["image", "question", "tags", "absent", "a.b", "\0", "x" * 2000, "a\nb"])
        }

    def check(rows: list[Row]) -> None:
        check_rows(rows)
        if command == "ask" and not settings:
            for number in valid:
                row = {"pixel": None, **rows[number]}
                assert (row["error"], row["pixel"], row.get("text")) == (None, (number, 0, 0), f"What{number}?"), row

    description = f"{command} {settings} {content[:400]!r}"
    return Trial(description, lambda: read(job(command, path, **settings)), [path.name, "columns"], check)


def json_lines(rng: random.Random) -> tuple[str, bytes, list[int]]:
    """Return a file, and the numbers of its valid rows."""
    lines, valid = [], []
    for number in range(4):
        fields = {"image": f"{number}.png", "question": f"What{number}?", "expression": "it", "tags": ["a", "b"]}
        changes = rng.choice([0, 0, 1, 1, 3])
        lines.append(
            mutate_json(fields, rng, changes).encode("utf-8", "surrogatepass")
            if changes
            else json.dumps(fields).encode()
        )
        valid += [] if changes else [number]
    content = rng.choice([b"", b"\xef\xbb\xbf"]) + rng.choice([b"\n", b"\r\n"]).join(lines)
    if rng.random() < 0.2:
        return "t", mutate_bytes(content, rng), []
    return "t", content, valid if b"\n\n" not in content else []


def parquet_file(rng: random.Random) -> tuple[str, bytes, list[int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "image": pa.array([f"{n}.png" for n in range(4)]),
        "question": pa.array([f"What{n}?" for n in range(4)]),
        "expression": pa.array(["it"] * 4),
        "tags": pa.array([["a"], None, [], ["a", "b"]]),
    }
    valid = [0, 1, 2, 3]
    for _ in range(rng.choice([0, 1, 1, 2])):
        name = rng.choice(list(columns))
        kind = rng.randrange(4)
        type = columns[name].type
        if kind == 0 and name in ("image", "question") and pa.types.is_string(type):
            columns[name] = bad_text(pa, columns, name, number := rng.randrange(4))
            valid = [n for n in valid if n != number]
        elif kind == 1 and pa.types.is_string(type):
            columns[name] = columns[name].cast(pa.large_string())
        elif kind == 2 and pa.types.is_string(type):
            columns[name] = columns[name].dictionary_encode()
        else:
            columns[name], valid = odd_column(pa, rng), []
    names = list(columns)
    if rng.random() < 0.1:
        names[rng.randrange(4)] = rng.choice(["image", "question", "a.b", "", "\n", "x" * 3000])
        valid = []
    table = pa.Table.from_arrays(list(columns.values()), names=names)
    file = io.BytesIO()
    try:
        pq.write_table(
            table, file, row_group_size=rng.choice([1, 2, 4]), compression=rng.choice(["none", "snappy", "zstd"])
        )
    except (pa.ArrowException, NotImplementedError):
        return "t", b"PAR1", []
    content = file.getvalue()
    return ("t", mutate_bytes(content, rng), []) if rng.random() < 0.35 else ("t", content, valid)


def bad_text(pa: Any, columns: dict[str, Any], name: str, number: int) -> Any:
    """Return a column of text in which one cell is not UTF-8."""
    cells = columns[name].view(pa.binary()).to_pylist()
    cells[number] = b"\xff\xfe" + cells[number]
    return pa.array(cells, pa.binary()).view(pa.string())


def odd_column(pa: Any, rng: random.Random) -> Any:
    """Return a column of a type that no field has."""
    return rng.choice(
        [
            lambda: pa.array([2**62, 0, -(2**62), None], pa.int64()).view(pa.timestamp("us")),
            lambda: pa.array([2**62, 1, 2, 3], pa.int64()).view(pa.timestamp("us", "Nowhere/Land")),
            lambda: pa.array([0, 1, 2, 3], pa.timestamp("ns", "+99:99")),
            lambda: pa.array([2**31 - 1, -(2**31), 0, 1], pa.int32()).cast(pa.date32()),
            lambda: pa.array([decimal.Decimal("1.5")] * 4),
            lambda: pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
            lambda: pa.array(
                [{"bytes": png((1, 1, 1)), "path": "x.png"}, None, {"bytes": b"", "path": None}, {"bytes": b"\0"}]
            ),
            lambda: pa.array([{"bytes": "0.png", "path": 7}] * 4),
            lambda: pa.array([2**62] * 4, pa.duration("us")),
            lambda: pa.array([True, None, False, True]),
            lambda: pa.array([float("nan"), float("inf"), -0.0, None]),
            lambda: pa.nulls(4),
            lambda: pa.array([b"\xff", b"", png((1, 2, 3)), b"a.png"]),
            lambda: pa.array([b"\xff" * 4] * 4, pa.binary(4)),
            lambda: pa.array([["a", None], ["\0"], [""], ["a" * 70000]]),
            lambda: pa.array([[[1]], [], None, [[2], []]]),
            lambda: pa.array([{"a": {"b": {"c": 1}}}] * 4),
            lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 4, pa.binary(16))),
            lambda: pa.array(["\0", "a\nb", "<extra_id_0>", "x" * 100000]),
            lambda: pa.array(["0.png", "/etc/passwd", "\0.png", "y" * 5000]),
        ]
    )()
