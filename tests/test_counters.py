"""`benchmarks/counters.py` reads ncu's raw page."""

import json
from pathlib import Path

import pytest

from benchmarks import counters
from benchmarks.harness import results

UNITS = {
    "gpu__time_duration.sum": "ns",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "%",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "%",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "inst",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "inst",
    "launch__thread_count": "thread",
}


def line(cells: list[object]) -> str:
    return ",".join(f'"{cell}"' for cell in cells) + "\n"


def page(kernels: list[str]) -> str:
    rows = [[n, name, f"{1000 * (n + 1):,}", 61.5, 12.25, 50, 3.5, 0.25, 128] for n, name in enumerate(kernels)]
    heads = ["ID", "Kernel Name", *UNITS], ["", "", *UNITS.values()]
    return "==PROF== Connected\n" + "".join(map(line, [*heads, *rows]))


def marked(*kernels: str) -> list[str]:
    """Return `kernels` in the first segment and one kernel in each of the others."""
    rest = [name for _ in counters.SEGMENTS[1:] for name in ("spin_kernel(long)", "some_kernel")]
    return ["void spin_kernel(long)", *kernels, *rest]


def test_kernels_belong_to_the_call_of_the_last_marker(tmp_path: Path) -> None:
    raw = tmp_path / "raw.csv"
    raw.write_text(page(marked("hidden_kernel", "update_kernel")), encoding="utf-8")
    assert counters.main(["--read", str(raw), "--out", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").glob(f"*/*/{results.COUNTERS}")
    kernels = json.loads(file.read_text(encoding="utf-8"))["kernels"]
    assert len(kernels) == 1 + len(counters.SEGMENTS)
    first, second, third, *_ = kernels
    assert (first["kernel"], first["operator"], first["direction"]) == (
        "hidden_kernel",
        counters.OPERATORS[0],
        "forward",
    )
    assert (second["kernel"], second["direction"]) == ("update_kernel", "forward")
    assert (third["kernel"], third["direction"]) == ("some_kernel", "backward")
    assert {kernel["operator"] for kernel in kernels} == set(counters.OPERATORS)
    assert first["metrics"]["gpu__time_duration.sum"] == 2000.0
    assert "launch__thread_count" not in first["metrics"]  # does not explain a gap


def test_a_line_shows_the_limit_of_a_kernel() -> None:
    kernels = list(counters.kernels_of(page(marked("hidden_kernel")).splitlines()))
    head, first, *_ = counters.table(kernels)
    assert head.split()[:4] == ["kernel", "us", "DRAM", "matrix"]
    assert first.split() == ["hidden_kernel", "2.0", "62%", "12%", "50%", "long_scoreboard", "3.5,", "barrier", "0.2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("==ERROR== The user does not have permission\n", "got no table with 'Kernel Name'"),
        (page(["hidden_kernel"]), rf"expected 1 to {len(counters.SEGMENTS)} markers .* among 1 kernels, got 0"),
    ],
)
def test_invalid_pages_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        list(counters.kernels_of(text.splitlines()))
