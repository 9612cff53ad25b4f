"""Values of Parquet tables as Python objects, in which one unreadable cell is an error of its row alone."""

from pathlib import Path
from typing import Any

from lion_fast.io.reading import Unreadable, on_one_line, shown


def rows_of(table: Any) -> list[dict[str, Any]]:
    """Return the rows of a `pyarrow.Table`.

    A cell that Python cannot represent, such as text that is not UTF-8 or a date in the year 20000, is `Unreadable`.
    """
    try:
        return table.to_pylist()
    except Exception:  # pyarrow raises errors of many types
        columns = [[_value(cell) for cell in column] for column in table.columns]
        return [dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except Exception:  # as above
        return Unreadable()


def check_columns(path: Path, names: list[str], required: list[str | None], optional: list[str | None]) -> None:
    """Check that a table has each column once.

    Raises:
        ValueError: a required column is missing, or a column that is read occurs several times.
    """
    place = on_one_line(path)
    for name in required:
        if name is not None and name not in names:
            some = ", ".join(shown(name)[1:-1] for name in names[:20])[:500]
            raise ValueError(f"{place}: expected a column {shown(name)}, got {some}")
    for name in (*required, *optional):
        if name is not None and names.count(name) > 1:
            raise ValueError(f"{place}: expected one column {shown(name)}, got {names.count(name)}")
