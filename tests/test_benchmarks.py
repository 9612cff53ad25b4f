"""The guarantees of the benchmarks: wrong results have no time, comparisons find slowdowns, and scripts clean up."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness import __main__ as harness
from benchmarks.harness import comparison, results, runs, side_by_side
from benchmarks.harness.memory import peak_bytes, saved_bytes
from benchmarks.harness.results import Entry, Run
from benchmarks.harness.side_by_side import DEVICE, DTYPE, Inputs, Operator, Suite, interleave, leaf, measure, report
from benchmarks.harness.work import work
from lion_fast.check import tuning
from lion_fast.check.cases import CASES
from lion_fast.cli import main
from lion_kernels.core import tuned_sizes
from lion_kernels.core.cost import Cost
from tests.extras import needs
from tests.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


class Recorder:
    """A stand-in for pytest-benchmark's fixture that keeps the times passed to it."""

    def __init__(self) -> None:
        self.extra_info: dict = {}
        self.group = ""
        self.times: list[float] = []

    def pedantic(self, function: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            start = side_by_side.clock()
            function()
            self.times.append(side_by_side.clock() - start)


def right(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def wrong_output(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight * 1.01


def wrong_gradient(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.detach() + (weight - weight.detach())


def unwritten(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight + torch.where(torch.arange(8, device=DEVICE) == 3, float("nan"), 0.0)


def unable(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this")


def slowed(x: Tensor, weight: Tensor) -> Tensor:
    until = time.process_time() + 0.004  # CPU time, because a single thread is timed without sleep
    while time.process_time() < until:
        pass
    return x * weight


def make_inputs() -> Inputs:
    return {"x": leaf(torch.randn(5, 8)), "weight": leaf(torch.randn(8))}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_last", [])
    monkeypatch.setattr(side_by_side, "SECONDS", 0.0)


def run(operator: Operator, name: str = "lion_kernels-x", peer: str | None = None, direction: str = "forward+backward"):
    """Measure anew."""
    side_by_side._last.clear()
    suite = Suite("product", {"eager": right, name: operator}, right, right, make_inputs, (Cost(1, 0), Cost(1, 0)))
    recorder = Recorder()
    measure(recorder, replace(suite, forward_only=frozenset({"forward alone"})), peer or name, direction, {"rows": 5})
    return recorder


@pytest.mark.parametrize("direction", results.DIRECTIONS)
def test_correct_results_are_timed(direction: str) -> None:
    recorder = run(right, direction=direction)
    assert len(recorder.times) >= side_by_side.MIN_ROUNDS
    assert min(recorder.times) > 0
    assert recorder.group == f"product, rows 5, {direction}"
    assert recorder.extra_info["shape"] == {"rows": 5}
    assert recorder.extra_info["floor_seconds"] > 0
    median, low, high = recorder.extra_info["ratio"]
    assert 0 < low <= median <= high


@pytest.mark.parametrize(
    ("operator", "tensor"), [(wrong_output, "out"), (wrong_gradient, "weight"), (unwritten, "out")]
)
def test_wrong_results_are_not_timed(operator: Operator, tensor: str) -> None:
    with pytest.raises(AssertionError, match=rf"wrong {tensor} \(relative error .*\), so no time"):
        run(operator)
    assert run(operator, peer="eager").times  # correct peers are still timed
    with pytest.raises(pytest.skip.Exception, match=rf"a peer has no time here: wrong {tensor}"):
        run(operator, "a peer")


def test_a_peer_that_does_not_run_is_skipped_and_ours_fails() -> None:
    with pytest.raises(pytest.skip.Exception, match="no kernel for this"):
        run(unable, "a peer")
    with pytest.raises(RuntimeError, match="no kernel for this"):
        run(unable)


def test_a_peer_without_backward_is_timed_forward_only() -> None:
    def forward_alone(x: Tensor, weight: Tensor) -> Tensor:
        assert not x.requires_grad, weight.requires_grad
        return x * weight

    assert run(forward_alone, "forward alone", direction="forward").times
    with pytest.raises(pytest.skip.Exception, match="forward alone has no backward"):
        run(forward_alone, "forward alone", direction="backward")
    assert run(forward_alone, "forward alone", peer="eager").times
    with pytest.raises(pytest.skip.Exception, match="wrong out"):
        run(wrong_output, "forward alone", direction="forward")


def test_the_floor_of_a_model_counts_its_products() -> None:
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(5, 8)
    assert work(lambda: linear(x).relu(), linear.parameters()) == Cost(4 * (8 * 4 + 4), 2 * 5 * 8 * 4)
    assert work(lambda: linear(x).sum().backward(), linear.parameters()).flops == 2 * 2 * 5 * 8 * 4
    assert work(lambda: x * x, [x]) == Cost(0, 0)


def test_no_benchmark_starts_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LION_BENCH_DEADLINE", str(time.time() - 1))
    with pytest.raises(pytest.skip.Exception, match="time that was given"):
        run(right)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the order of a CPU's calls")
def test_peers_take_turns_in_both_orders() -> None:
    called: list[str] = []
    calls = {name: (None, lambda _, name=name: called.append(name)) for name in "abc"}
    taken = interleave(calls, 0.0)
    warm, rounds = called[:3], called[3:]
    assert warm == ["a", "b", "c"]
    assert rounds[:6] == ["a", "b", "c", "c", "b", "a"]
    assert {name: len(times) for name, times in taken.items()} == dict.fromkeys("abc", len(rounds) // 3)


def test_memory() -> None:
    x = torch.randn(1000, 10, device=DEVICE, requires_grad=True)
    nbytes = 4 * x.numel()
    assert saved_bytes(lambda x: (x.exp() * 2).sin(), {"x": x}) == 2 * nbytes  # the result of exp, the input of sin
    assert saved_bytes(lambda x: x * 2, {"x": x}) == 0
    assert saved_bytes(lambda x: x.sin(), {"x": x}) == 0  # inputs do not count
    with torch.no_grad():
        assert nbytes * 2 <= peak_bytes(lambda: x.exp().sin(), DEVICE) <= nbytes * 2 + 4096


def entry(operator: Operator, name: str = "lion_kernels-x") -> Entry:
    """Return an entry as `benchmarks/conftest.py` and `python -m benchmarks.harness run` make it."""
    recorder = run(operator, name)
    seconds = sorted(recorder.times)
    quantiles = seconds[len(seconds) // 2], seconds[len(seconds) // 5], seconds[-len(seconds) // 5]
    record = {"group": recorder.group, "seconds": quantiles, "rounds": len(seconds), **recorder.extra_info}
    return results.make_entry(json.loads(json.dumps(record)))


def make_run(*entries: Entry, device: str = "a device") -> Run:
    environment = results.describe_machine(ROOT) | {"device": device}
    return Run(environment, entries)


def replace_environment(run: Run, **changed: str) -> Run:
    return replace(run, environment={**run.environment, **changed})


def test_a_slowed_kernel_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results.save(make_run(entry(right)), tmp_path / "a")
    same = results.save(make_run(entry(right)), tmp_path / "b")
    after = results.save(make_run(entry(slowed)), tmp_path / "c")
    assert harness.main(["compare", str(before), str(after)]) == 1
    out = capsys.readouterr().out
    assert "SLOWER" in out
    assert "product, rows 5, forward+backward: lion_kernels-x" in out
    assert "1 times compared: 1 slower, 0 missing" in out
    assert harness.main(["compare", str(after), str(same)]) == 0
    assert "faster" in capsys.readouterr().out


ENTRY = Entry("product", "product, forward", "lion_kernels-x", (1.0, 0.98, 1.05), 50)


@pytest.mark.parametrize(
    ("seconds", "regressed"), [((1.10, 1.08, 1.15), False), ((1.2, 1.18, 1.25), True), ((0.5, 0.4, 0.6), False)]
)
def test_the_threshold_includes_the_spread_of_both_runs(seconds: tuple[float, float, float], regressed: bool) -> None:
    (change,) = comparison.compare(make_run(ENTRY), make_run(replace(ENTRY, seconds=seconds)))
    assert change.regressed is regressed


def test_a_busier_machine_is_not_a_regression() -> None:
    before = replace(ENTRY, baseline="eager", ratio=(0.5, 0.49, 0.51))
    after = replace(before, seconds=(3.0, 2.9, 3.1))
    assert not comparison.compare(make_run(before), make_run(after))[0].regressed
    assert comparison.compare(make_run(before), make_run(replace(before, ratio=(0.6, 0.59, 0.61))))[0].regressed


def test_peers_may_slow_down_but_our_times_must_not_disappear() -> None:
    peer = replace(ENTRY, peer="eager")
    before, after = make_run(ENTRY, peer), make_run(ENTRY, replace(peer, seconds=(9.0, 8.9, 9.1)))
    assert [change.regressed for change in comparison.compare(before, after)] == [False]
    lost = make_run(peer, replace(ENTRY, group="another"))
    assert comparison.missing(before, lost) == [ENTRY]
    assert not comparison.compare(before, make_run(peer))  # none of ours is correct any more
    with pytest.raises(ValueError, match="same suites"):
        comparison.compare(before, make_run(replace(ENTRY, suite="another")))
    with pytest.raises(ValueError, match="one device"):
        comparison.compare(before, make_run(ENTRY, device="another"))


def test_results_survive_saving_and_loading(tmp_path: Path) -> None:
    full = replace(ENTRY, shape={"rows": 5}, ratio=(1.0, 0.9, 1.1), baseline="eager", peak_bytes=7, other={"aim": 0.5})
    folder = results.save(make_run(ENTRY, full, replace(ENTRY, suite="other")), tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == ["other.json", "product.json"]
    loaded = results.load(folder)
    assert set(map(repr, loaded.entries)) == set(map(repr, (ENTRY, full, replace(ENTRY, suite="other"))))
    assert loaded.environment["torch"] == torch.__version__
    assert results.load_all(tmp_path) == {"a device": [loaded]}
    earlier = replace_environment(make_run(ENTRY), commit="zzz", started="1999-12-31")
    results.save(earlier, tmp_path)
    assert [run.environment["commit"] for run in results.load_all(tmp_path)["a device"]] == [
        loaded.environment["commit"],
        "zzz",
    ]
    (folder / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json: expected results"):
        results.load(folder)
    with pytest.raises(ValueError, match="found none"):
        results.load(tmp_path)


def test_the_error_names_an_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main(["run", "nothing"]) == 2
    assert "suites: expected some of assemble_inputs, " in capsys.readouterr().err


def test_the_old_command_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report"]) == 2
    assert "report: run, compare and report are now `python -m benchmarks.harness`" in capsys.readouterr().err


def test_bench_run_writes_its_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "clone"
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
    lines = ["def test_good(benchmark):", "    benchmark.extra_info['note'] = 3", "    benchmark(lambda: 1)"]
    lines += ["def test_bad(benchmark):", "    assert False"]
    (folder / "benchmarks" / "bench_thing.py").write_text("\n".join(lines))
    monkeypatch.setattr(runs, "ROOT", folder)
    monkeypatch.setattr(runs, "FOLDER", folder / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    written, status = runs.run(["thing"], tmp_path / "out", None, quick=True)
    assert status == 1  # one failed, and the other was written
    assert written is not None
    (only,) = results.load(written).entries
    assert (only.suite, only.peer, only.other) == ("thing", "test_good", {"note": 3})


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_suite_with_correct_peers(operator: str) -> None:
    """The smallest of its shapes is tested, for which nothing is compiled on a CPU."""
    suite = importlib.import_module(f"benchmarks.bench_{operator}")
    (cases,) = (mark for mark in suite.bench.pytestmark if mark.name == "parametrize")
    shapes = [case.values[0] for case in reversed(cases.args[1])]
    shape = min(shapes, key=lambda shape: math.prod(size for size in shape.values() if isinstance(size, int)))
    recorder = Recorder()
    suite.bench(recorder, shape, "forward", "lion_kernels-torch")
    assert recorder.times
    assert len(recorder.extra_info["ratio"]) == 3
    ((_, compared),) = side_by_side._last
    assert not compared.problems
    assert set(compared.memory) == set(compared.suite.operators) - compared.suite.forward_only


def test_the_commit_of_a_copy_without_history_can_be_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LION_BENCH_COMMIT", raising=False)
    assert results.describe_machine(tmp_path)["commit"] == "unknown"
    monkeypatch.setenv("LION_BENCH_COMMIT", "1a2b3c4")
    assert results.describe_machine(tmp_path)["commit"] == "1a2b3c4"


def test_results_of_a_dead_run_are_recovered(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as died:
        pass
    described = results.describe_machine(ROOT)
    records = tmp_path / f"records-{died.pid}.jsonl"
    entry = {"suite": "s", "group": "g", "peer": "p", "seconds": [1.0, 0.9, 1.1], "rounds": 3}
    records.write_text(f"{json.dumps(described)}\n{json.dumps(entry)}\n{{'suite': 's', 'gro", encoding="utf-8")
    running = tmp_path / f"records-{os.getpid()}.jsonl"
    running.write_text(f"{json.dumps(described)}\n", encoding="utf-8")
    (folder,) = runs.recover(tmp_path)
    records.write_text(json.dumps(described), encoding="utf-8")  # died at once
    assert not runs.recover(tmp_path)
    assert [entry.peer for entry in results.load(folder).entries] == ["p"]
    assert not records.exists()
    assert running.exists()


def test_the_report_lists_where_a_peer_wins(tmp_path: Path) -> None:
    needs("matplotlib", "quickstart")
    from benchmarks.harness.report import write_report

    entry = replace(ENTRY, direction="forward", floor_seconds=0.4)
    peer = replace(entry, peer="a peer", seconds=(0.5, 0.49, 0.51))
    other = replace(ENTRY, group="product, backward")
    run = make_run(entry, peer, other, replace(other, peer="a peer", seconds=(2.0, 1.9, 2.1)))
    results.save(run, tmp_path / "results")
    page, *charts = write_report(tmp_path / "results", tmp_path / "docs" / "benchmarks.md")
    text = page.read_text(encoding="utf-8")
    assert "In 1 of 2 comparisons a peer is faster" in text
    assert "| product, forward | a peer | 500 ms | 1 s | 2.00 |" in text
    assert "**Not measured yet.**" in text
    assert any(file.name == "bench_product.png" for file in charts)
    assert all(file.is_file() and f"images/{file.name}" in text for file in charts)
    with pytest.raises(ValueError, match="found none"):
        write_report(tmp_path / "nowhere", page)


def test_the_report_has_training_steps() -> None:
    """It lists images per second and shares of time, memory and matrix rate; eager may be out of memory."""
    from benchmarks.harness.report import _training_steps

    settings: dict = {"suite": "training_step_16", "group": "16", "shape": {"pictures": 16}, "baseline": "original"}
    ours = replace(ENTRY, **settings, peer="lion_fast", seconds=(0.2, 0.19, 0.22), ratio=(0.25, 0.24, 0.26))
    ours = replace(ours, peak_bytes=30_000_000_000, floor_seconds=0.1, other={"images_per_second": 80.0})
    eager = replace(ours, peer="original", peak_bytes=60_000_000_000, ratio=None)
    alone = replace(ours, group="64", shape={"pictures": 64}, ratio=None)
    rows = list(_training_steps(make_run(eager, ours, alone)))
    assert "| pictures 16 | lion_fast | 200 ms (190 ms to 220 ms) | 80.0 | 0.25 | 30000 MB | 50% | 50% |" in rows
    assert "| pictures 64 | lion_fast | 200 ms (190 ms to 220 ms) | 80.0 |  | 30000 MB |  | 50% |" in rows
    assert not list(_training_steps(make_run(ENTRY)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tune"]) == 2
    assert "finds none here" in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert "expected --tune" in capsys.readouterr().err


@pytest.mark.skipif(DEVICE.type != "cpu", reason="with times that are made up")
def test_tuning_accepts_faster_and_correct_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    case = next(case for case in CASES if case.operator == "rms_norm")
    sizes: dict[str, int] = {}

    def clock(call: Callable[[], object]) -> tuning.Seconds:
        """Make eight warps the fastest, and two rows better than one."""
        with_table = tuned_sizes.lookup("rms_norm_forward", "D64", dict(sizes))
        cost = abs(with_table.get("num_warps", 4) - 8) + abs(with_table.get("BT", 32) - 64) / 64 + 1
        return tuning.Seconds(cost, 0.99 * cost, 1.01 * cost)

    with tuned_sizes.overriding({}) as seen:
        case.run(tuning.make_tensors(case, DTYPE, DEVICE))
    sizes.update(seen["rms_norm_forward", "D64"])
    found = {one.key: one for one in tuning.tune((case,), DEVICE, DTYPE, time.time() + 100, clock)}
    best = found["rms_norm_forward", "D64"]
    assert best.sizes == {**sizes, "num_warps": 8, "BT": 64}
    assert best.after < best.before
    assert tuned_sizes.lookup("rms_norm_forward", "D64", sizes) == sizes  # nothing has changed

    monkeypatch.setattr(tuning, "allowed", lambda dtype: -1.0)  # makes every result wrong
    with pytest.raises(ArithmeticError, match="differs"):
        next(tuning.tune((case,), DEVICE, DTYPE, time.time() + 100, clock))


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.slow
def test_the_gpu_script_keeps_its_results(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT), str(tmp_path / "out"), "environment"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "environment    passed" in run.stdout.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "environment.json").read_text(encoding="utf-8"))["torch"] == torch.__version__
    assert run.stdout.splitlines()[-1] in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    command[-1] = "enviroment"
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "no part enviroment\n")


@pytest.mark.parametrize("group", ["FIRST", "SECOND"])
def test_a_call_of_the_gpu_script_ends_within_six_minutes(group: str) -> None:
    """Each part has its own time limit, and Python starts quickly in between."""
    text = SCRIPT.read_text(encoding="utf-8")
    (parts,) = re.findall(rf"^{group}=\((.*)\)$", text, re.MULTILINE)
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[([\w-]+)\]=(\d+)", text)}
    assert len(parts.split()) >= 4
    assert sum(limits[part] for part in parts.split()) <= 350
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for part in parts.split():  # the page has the script's plan
        assert re.search(rf"^\| `{part}` \|.*\| {limits[part]} \|", page, re.MULTILINE), part


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_gpu_script_stops_when_it_is_interrupted(tmp_path: Path) -> None:
    """The terminal's signal reaches only the script; no process must be killed, and no further part starts."""
    waits = "import time; print('begun', flush=True); time.sleep(100)"
    python = tmp_path / "python"
    waiting = f'{sys.executable} -c "$2" {sys.executable} -c "{waits}"'
    python.write_text(f'#!/usr/bin/env bash\ncase "$*" in *"harness run"*) exec {waiting} ;; esac\n')
    python.chmod(0o755)
    # A shell cannot receive signals that were ignored at its start, as SIGINT is for background processes.
    hears = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", hears, str(SCRIPT), str(tmp_path / "out"), "environment", "rows", "tuning"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHON": str(python)}, **pipe) as script:
        lines = []
        while not lines or lines[-1] != "begun\n":
            lines.append(script.stdout.readline())
            assert lines[-1], lines
        os.killpg(script.pid, signal.SIGINT)
        rest, _ = script.communicate(timeout=60)
    assert script.returncode == 1
    assert "KeyboardInterrupt" in rest
    assert "environment    passed" in rest
    assert "rows           failed" in rest
    assert "tuning" not in rest


def test_report_passes_on_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    report(recorder, {"a": [2.0, 3.0], "b": [1.0, 2.0]}, "a", baseline="b", group="g", suite="s")
    assert recorder.times == [2.0, 3.0]
    assert recorder.extra_info["ratio"][0] == pytest.approx(1.75)
