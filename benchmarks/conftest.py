"""The record of every benchmark in a run: a line of JSON, written at once to the file in `LION_BENCH_RECORDS`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lion_fast.check.timing import quantiles


@pytest.fixture(autouse=True)
def _record(request: pytest.FixtureRequest) -> Iterator[None]:
    given = request.node.funcargs  # missing for an interrupted test
    yield
    records = os.environ.get("LION_BENCH_RECORDS")
    benchmark = given.get("benchmark")
    if records is None or benchmark is None or benchmark.stats is None or benchmark.has_error:
        return
    times = benchmark.stats.stats.data
    seconds = quantiles(times)
    info = dict(benchmark.extra_info)
    entry = {
        "suite": info.pop("suite", request.path.stem.removeprefix("bench_")),
        "group": benchmark.group or request.path.stem,
        "peer": info.pop("peer", benchmark.param or request.node.name),
        "seconds": [seconds.median, seconds.low, seconds.high],
        "rounds": len(times),
        **info,
    }
    with Path(records).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
