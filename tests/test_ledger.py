"""The ledger and the quoted figures: newest results, missing measurements, and no manual edits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import __main__ as command
from benchmarks.harness import figures, ledger, results
from benchmarks.harness.headline import CPU_HEADLINES, HEADLINES, SUITE, Headline
from benchmarks.harness.results import Entry, Run
from tests.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
H200 = "NVIDIA H200"
RMS = next(one for one in HEADLINES if one.operator == "rms_norm")
MIXED = HEADLINES[0]
ENVIRONMENT = {"cpu": "a CPU", "cpu_threads": 1, "cpu_cores": 1, "driver": "1", "python": "3", "load_average": 0.0}
ENVIRONMENT |= dict.fromkeys(("torch", "triton", "transformers"), "1")


def make_run(*entries: Entry, day: int = 1, device: str = H200, gpu: bool = True, counted: tuple = ()) -> Run:
    date = f"2026-01-{day:02}"
    described = {"device": device, "gpu": device if gpu else None, "commit": f"commit{day}", "date": date}
    return Run(ENVIRONMENT | described | {"started": f"{date}T00:00:00"}, entries, counted)


def entry(of: Headline, peer: str, seconds: float, direction: str = "forward", **changed: Any) -> Entry:
    made = Entry(of.suite, "a group", peer, (seconds, 0.9 * seconds, 1.1 * seconds), 9, direction, of.entry_shape)
    return replace(made, dtype="bfloat16", floor_seconds=1e-5, **changed)


def line(rows: list[ledger.Row], of: Headline, direction: str = "forward") -> str:
    (row,) = (row for row in rows if row.headline == of and row.direction == direction)
    return list(ledger.lines([row]))[2]


@pytest.fixture(scope="module")
def committed() -> dict[str, list[Run]]:
    return results.load_all(RESULTS)


def test_every_headline_is_listed_once() -> None:
    for headlines in (HEADLINES, CPU_HEADLINES):
        assert len({(one.operator, one.label) for one in headlines}) == len(headlines)
        assert len({repr(one.sources[0]) for one in headlines}) == len(headlines)
    assert {one.operator for one in HEADLINES} >= set(OPERATORS)
    assert {one.suite for one in HEADLINES if one.operator in OPERATORS} == {SUITE}


def test_headlines_name_shapes_as_their_suites_do(committed: dict[str, list[Run]]) -> None:
    """A name that its suite lacks would leave a row empty forever."""
    shapes: dict[str, set] = {}
    for of_device in committed.values():
        for run in of_device:
            for one in run.entries:
                shapes.setdefault(one.suite.rstrip("0123456789"), set()).add(frozenset(one.shape))
    for one in (*HEADLINES, *CPU_HEADLINES):
        for source in one.sources:
            if source.suite != SUITE:
                assert frozenset(source.shape) in shapes[source.suite.rstrip("0123456789")], source


def test_every_row_of_the_cpu_is_measured(committed: dict[str, list[Run]]) -> None:
    for device, table in ledger.tables(committed).items():
        if device.startswith(ledger.EXPECTED):
            continue
        assert [row.headline.label for row in table if row.run is None or row.ours is None or row.peer is None] == []


def test_missing_measurements_are_marked() -> None:
    tables = ledger.tables({})
    assert list(tables) == ["NVIDIA H100", H200]
    for table in tables.values():
        assert [row.headline for row in table] == [one for one in HEADLINES for _ in one.directions]
        for text in list(ledger.lines(table))[2:-1]:
            assert text.endswith("| not measured yet |  |  |  |  |  |")
    tables = ledger.tables({"NVIDIA H100 80GB HBM3": [make_run(device="NVIDIA H100 80GB HBM3")]})
    assert list(tables) == ["NVIDIA H100 80GB HBM3", H200]


def test_a_row_has_its_newest_result() -> None:
    old = make_run(
        entry(RMS, "lion_kernels-triton", 4e-5),
        entry(RMS, "eager", 9e-5),
        entry(RMS, "lion_kernels-triton", 8e-5, "backward"),
        entry(RMS, "eager", 6e-5, "backward"),
    )
    fp32 = replace(entry(RMS, "lion_kernels-triton", 1e-5), dtype="float32")
    new = make_run(entry(RMS, "lion_kernels-triton", 2e-5), entry(RMS, "F.rms_norm", 8e-5), fp32, day=2)
    rows = ledger.rows([new, old])
    assert line(rows, RMS) == (
        "| rms_norm | 16,384 x 2048 | forward | 20 us | 50% | F.rms_norm, 80 us | 0.25 | commit2 | 2026-01-02 |"
    )
    assert line(rows, RMS, "backward").endswith("| 80 us | 12% | eager, 60 us | 1.33 | commit1 | 2026-01-01 |")
    assert "not measured yet" in line(rows, MIXED)


def test_other_suites_count_only_at_the_same_shape() -> None:
    (elsewhere,) = RMS.elsewhere
    theirs = replace(entry(RMS, "lion_kernels-triton", 5e-5), suite=elsewhere.suite, shape=dict(elsewhere.shape))
    headline_run = make_run(entry(RMS, "lion_kernels-triton", 2e-5), day=1)
    assert "| 50 us | 20% | none |  | commit2" in line(ledger.rows([make_run(theirs, day=2), headline_run]), RMS)
    wrong = replace(theirs, shape={**elsewhere.shape, "tokens": 5})
    assert "commit1" in line(ledger.rows([make_run(wrong, day=2), headline_run]), RMS)
    biased = next(one for one in HEADLINES if one.operator == "relative_bias_attention")
    (elsewhere,) = biased.elsewhere
    theirs = [
        replace(entry(biased, "lion_kernels-triton", 5e-5, way), suite=elsewhere.suite, shape=dict(elsewhere.shape))
        for way in biased.directions
    ]
    rows = ledger.rows([make_run(*theirs)])
    assert "| 50 us |" in line(rows, biased)
    assert "not measured yet" in line(rows, biased, "backward")  # that suite's backward includes the table's gradient


def test_an_older_result_does_not_hide_a_wrong_one() -> None:
    right = make_run(entry(RMS, "lion_kernels-triton", 2e-5))
    rows = ledger.rows([make_run(entry(RMS, "eager", 9e-5), day=2), right])
    assert line(rows, RMS).endswith("| forward | **no correct result** |  | eager, 90 us |  | commit2 | 2026-01-02 |")


def test_a_headline_has_the_same_label_everywhere() -> None:
    one = entry(MIXED, "eager", 1e-5)
    assert ledger.label(one) == f"mixture_of_adapters, {MIXED.label}"
    assert ledger.label(replace(one, shape={"operator": "another"})) == "operator another"
    assert ledger.label(replace(one, suite="rms_norm", shape={"tokens": 5})) == "tokens 5"


def test_ratios_to_the_baseline_are_by_round() -> None:
    eager = entry(RMS, "eager", 6e-5, baseline="eager", ratio=(1.0, 1.0, 1.0))
    ours = entry(RMS, "lion_kernels-triton", 3e-5, baseline="eager", ratio=(0.4, 0.3, 0.5))
    slower = entry(RMS, "lion_kernels-torch", 5e-5, baseline="eager", ratio=(0.9, 0.8, 1.0))
    text = line(ledger.rows([make_run(eager, ours, slower)]), RMS)
    assert "| 30 us (lion_kernels-triton) | 33% | eager, 60 us | 0.40 |" in text
    fused = entry(RMS, "F.rms_norm", 4e-5, baseline="eager", ratio=(0.5, 0.4, 0.6))
    assert "| F.rms_norm, 40 us | 0.75 |" in line(ledger.rows([make_run(eager, ours, fused)]), RMS)


def test_the_limits_of_kernels_follow_the_table_of_their_gpu(tmp_path: Path) -> None:
    stalled = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    metrics = {"dram__throughput.avg.pct_of_peak_sustained_elapsed": 71.23, "launch__registers_per_thread": 168}
    metrics |= {stalled.format(name): value for name, value in {"wait": 0.5, "math_pipe_throttle": 2.25}.items()}
    kernels = [{"kernel": "update_kernel", "operator": "mixture_of_adapters", "metrics": metrics, "grid": [1]}]
    kernels.append({"kernel": "rows", "operator": "rms_norm", "metrics": {"launch__registers_per_thread": 1234}})
    folder = results.save(make_run(entry(RMS, "lion_kernels-triton", 2e-5)), tmp_path)
    counters = folder / "ncu.json"
    counters.write_text(json.dumps({"kernels": kernels}), encoding="utf-8")
    devices = results.load_all(tmp_path)
    devices[H200].insert(0, make_run(day=2))  # has no counters, so the previous ones stay
    text = "\n".join(ledger.write(devices))
    after = text[text.index(f"### {H200}: ledger") :]
    assert f"**What limits the main kernels on {H200}**" in after
    assert "| kernel | operator | DRAM, % of peak | registers | waits most for |" in after
    assert (
        "| `update_kernel` | mixture_of_adapters | 71.2 | 168 | math pipe throttle 2.25, wait 0.5 |\n"
        "| `rows` | rms_norm |  | 1,234 |  |"
    ) in after
    assert "What limits" not in text[: text.index(f"### {H200}: ledger")]
    for wrong, message in (({}, "expected kernels"), ({"kernels": [{**kernels[0], "metrics": {"a": "1"}}]}, "numbers")):
        counters.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"ncu\.json: expected .*{message.split()[-1]}"):
            results.load(folder)


QUOTED = {
    "README.md": ["cpu", "bulk", "gpu"],
    "CHANGELOG.md": ["cpu", "gpu"],
    "docs/bulk.md": ["bulk-table"],
    "docs/data.md": ["data"],
    "docs/index.md": ["gpu"],
    "docs/operators/index.md": ["gpu"],
    **{f"docs/operators/{operator}.md": [f"operator {operator}"] for operator in OPERATORS},
}


def test_the_list_of_pages_with_figures() -> None:
    found = {
        str(path.relative_to(ROOT)): figures.blocks(path.read_text(encoding="utf-8")) for path in figures.pages(ROOT)
    }
    assert found == QUOTED


@pytest.mark.parametrize("page", QUOTED)
def test_pages_quote_the_results(page: str, committed: dict[str, list[Run]]) -> None:
    """`python -m benchmarks.harness report` writes the figures; a manual change is detected."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert figures.quote(text, committed) == text
    for name in figures.blocks(text):
        start = text.index(f"<!-- begin: {name} -->")
        at = next(place for place in range(start + len(f"<!-- begin: {name} -->"), len(text)) if text[place].isalnum())
        changed = text[:at] + "7" + text[at + 1 :]
        assert changed != text
        assert figures.quote(changed, committed) == text


def test_the_page_of_benchmarks_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are not drawn, because matplotlib determines their bytes."""
    figure = pytest.importorskip("matplotlib.figure")
    from benchmarks.harness.report import write_report

    monkeypatch.setattr(figure.Figure, "savefig", lambda *_, **__: None)
    page, *charts = write_report(RESULTS, tmp_path / "benchmarks.md")
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all((ROOT / "docs" / "images" / chart.name).is_file() for chart in charts)
    text = page.read_text(encoding="utf-8")
    tables = [text.index(f"### {device}: ledger") for device in ledger.tables(results.load_all(RESULTS))]
    assert tables == sorted(tables)
    assert tables[-1] < text.index("## How it is measured")


def test_the_peers_of_a_chart_have_a_fixed_order() -> None:
    """The order does not depend on set iteration."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from benchmarks.harness import charts

    peers = ["lion_kernels-torch", "lion_kernels-triton", *(f"peer {number}" for number in range(8))]
    made = [entry(RMS, peer, 1e-5, baseline="eager", ratio=(0.5, 0.4, 0.6)) for peer in reversed(peers)]
    assert charts._peers(figure, make_run(*made))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == peers
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["rms norm"]  # the operator, not the suite


def gpu_paragraph(*devices: Run) -> str:
    text = "<!-- begin: gpu -->\n<!-- end: gpu -->"
    quoted = figures.quote(text, {run.device: [run] for run in devices})
    return " ".join(line for line in quoted.splitlines()[2:-2] if line)


def test_a_gpu_without_runs_is_not_measured_yet() -> None:
    cpu = make_run(device="a CPU", gpu=False)
    assert gpu_paragraph(cpu) == "**GPU**: nothing has been measured yet, so we make no speed claims."
    assert gpu_paragraph(make_run()) == gpu_paragraph(cpu)  # it has runs, but no headline
    text = "<!-- begin: operator rms_norm -->\n<!-- end: operator rms_norm -->\n"
    assert "\n\nOn a GPU: not measured yet.\n\n" in figures.quote(text, {"a CPU": [cpu]})


def test_figures_of_a_gpu_include_losses_and_gaps() -> None:
    run = make_run(
        *(entry(RMS, peer, seconds) for peer, seconds in (("lion_kernels-triton", 2e-5), ("eager", 4e-5))),
        *(entry(RMS, peer, seconds, "backward") for peer, seconds in (("lion_kernels-triton", 9e-5), ("eager", 3e-5))),
        entry(MIXED, "eager", 4e-5),
    )
    text = gpu_paragraph(run)
    total = sum(len(one.directions) for one in HEADLINES)
    assert f"**{H200}**, bf16: against the fastest peer in each row, ours is faster in 1 of {total} rows" in text
    assert f"within 5% in 0 and slower in 1; 1 without a correct result; {total - 3} not measured yet." in text
    assert "| rms_norm | 16,384 x 2048 | forward | 20 us | 50% | eager, 40 us | 0.50 | commit1 | 2026-01-01 |" in text
    assert "mixed tasks | forward | **no correct result** |" in text
    assert "not measured yet |" not in text  # only the ledger has those rows
    assert "**NVIDIA H100**: not measured yet." in text
    page = figures.quote("<!-- begin: operator rms_norm -->\n<!-- end: operator rms_norm -->\n", {H200: [run]})
    assert "| rms_norm | 16,384 x 2048 | backward | 90 us | 11% | eager, 30 us | 3.00 | commit1 | 2026-01-01 |" in page
    assert "On NVIDIA H100: not measured yet." in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin: gpu -->\n", "expected an end"),
        ("<!-- begin: gpu -->\n<!-- end: cpu -->\n", "expected an end"),
        ("<!-- begin: gpu -->\n<!-- begin: cpu -->\n<!-- end: gpu -->\n<!-- end: cpu -->\n", "expected an end"),
        ("<!-- begin: speed -->\n<!-- end: speed -->\n", "expected a block of bulk, .*, got 'speed'"),
        ("<!-- begin: operator rms -->\n<!-- end: operator rms -->\n", "an operator with headlines, got 'rms'"),
    ],
)
def test_the_error_names_an_invalid_block(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no block", encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"CHANGELOG\.md: .*{message}"):
        figures.write(tmp_path, {})


def test_the_report_updates_the_figures_of_its_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    for file in RESULTS.glob("*/*/bulk.json"):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True)
        shutil.copy(file, copy)
    (tmp_path / "docs").mkdir()
    empty = "before\n\n<!-- begin: bulk -->\n<!-- end: bulk -->\n\nafter\n"
    for page in ("README.md", "CHANGELOG.md"):
        (tmp_path / page).write_text(empty, encoding="utf-8")
    assert not command.main(["report", "--page", str(tmp_path / "page.md")])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == empty  # only the other page changes
    assert not command.main(["report"])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n\n<!-- begin: bulk -->\n\n**Bulk captions**")
    assert text.endswith("\n\n<!-- end: bulk -->\n\nafter\n")
    assert (tmp_path / "docs" / "benchmarks.md").is_file()
