"""Whole jobs: every row occurs once and equals a single call's, after any kills and on any number of processes."""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from lion_fast import LionForCausalLM, LionProcessor
from lion_fast.inference.bulk import BulkJob, run
from lion_fast.inference.bulk.running import plan_batches
from lion_fast.io.boxes import parse_boxes
from lion_fast.io.images import load_image
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION
from tests.extras import needing, needs
from tests.lion_fast.inference.bulk.inputs import CORRUPT, COUNT, by_id, rows_in
from tests.lion_fast.processes import PATIENCE, finish, import_path
from tests.lion_fast.tiny import make_tagger
from tests.rounding import between

MakeJob = Callable[..., BulkJob]
Start = Callable[..., Any]
NEEDS_PYARROW = needing("pyarrow", "parquet")


@pytest.fixture
def ask_singly(checkpoint: Path) -> Callable[..., str]:
    """Answer one question about one image with the model's own methods."""
    model = LionForCausalLM.from_pretrained(checkpoint).eval()
    processor = LionProcessor.from_pretrained(checkpoint)

    def ask(image: Path, question: str, tags: Any = None, task: str = "image_level", **limits: int) -> str:
        batch = processor(images=[image], text=[question], tags=[tags], task=task)
        return processor.batch_decode(model.generate(**batch, **limits), skip_special_tokens=True)[0].strip()

    return ask


def test_answers_equal_single_calls(make_job: MakeJob, images: Path, ask_singly: Callable[..., str]) -> None:
    """Questions have different lengths, with and without tags; batches are grouped by length and use beams."""
    job = make_job("ask", num_beams=2, max_new_tokens=5)
    summary = run(job, batch_size=7, num_workers=1)
    table = [json.loads(line) for line in (images / "table.jsonl").open()]
    rows = rows_in(job.out)
    assert (summary.rows, summary.errors, summary.before) == (COUNT, len(CORRUPT), 0)
    assert Counter(row["id"] for row in rows) == Counter(f"table.jsonl:{n}" for n in range(1, COUNT + 1))
    for row in [row for n, row in enumerate(rows) if n % 3 == 0 or row["image"] in CORRUPT]:
        fields = table[int(row["id"].split(":")[1]) - 1]
        assert (row["image"], row["question"]) == (fields["image"], fields["question"])
        if row["image"] in CORRUPT:
            assert row["answer"] is None
            assert "expected an image file" in row["error"]
            continue
        limits = {"num_beams": 2, "max_new_tokens": 5}
        assert row["answer"] == ask_singly(images / row["image"], row["question"], fields["tags"], **limits)
        assert row["error"] is None
    assert len({row["answer"] for row in rows}) > 20, "answers that hardly differ would show nothing"


def test_boxes_equal_single_calls(make_job: MakeJob, images: Path, ask_singly: Callable[..., str]) -> None:
    job = make_job("locate", text="the red circle", tags="a, b", input=str(images / "pictures" / "0000*.png"))
    assert run(job, batch_size=4, num_workers=0).rows == 5
    for row in rows_in(job.out):
        question = LOCATE_INSTRUCTION.format(expression="the red circle")
        answer = ask_singly(row["id"], question, "a, b", task="region_level")
        assert (row["expression"], row["answer"]) == ("the red circle", answer)
        assert row["boxes"] == parse_boxes(answer, load_image(row["id"]).size)


@NEEDS_PYARROW
def test_boxes_are_in_pixels(make_job: MakeJob, images: Path, checkpoint: Path, monkeypatch) -> None:
    """The model answers every question with a box."""
    tokenizer = LionProcessor.from_pretrained(checkpoint).tokenizer
    answer = tokenizer(["[0.250,0.000,0.500,1.000]"], return_tensors="pt").input_ids
    monkeypatch.setattr(LionForCausalLM, "generate", lambda self, **inputs: answer.expand(len(inputs["input_ids"]), -1))
    job = make_job("locate", out="rows.parquet")
    run(job, num_workers=0)
    rows = [row for row in rows_in(job.out) if row["error"] is None]
    assert len(rows) == COUNT - len(CORRUPT)
    assert all(row["boxes"] == [[8.0, 0.0, 16.0, 32.0]] for row in rows)


@pytest.fixture(scope="module")
def captions(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Output of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    run(BulkJob("caption", str(images / "pictures"), str(out), str(checkpoint)), batch_size=5, num_workers=0)
    return out.read_bytes()


def parsed(captions: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in captions.splitlines()]


@pytest.mark.parametrize("out", ["rows.jsonl", pytest.param("rows.parquet", marks=NEEDS_PYARROW)])
def test_kills_change_nothing(make_job: MakeJob, start: Start, captions: bytes, out: str) -> None:
    """A job survives three SIGKILLs at any moment, and a truncated last row after one of them."""
    rng = random.Random(out)
    job, options = make_job(out=out), {"batch_size": 5, "num_workers": 1, "rows_per_part": 30}
    workers: list[str] = []
    for kill in range(3):
        there, share = len(ids_of(job)), COUNT // 4
        process = start(job, hold_at=share * (kill + 1) - there, **options)
        workers += kill_at(job, [process], share * kill + rng.randrange(6, share - 5))
        if kill == 1:
            # There is no journal if the kill came after the rows were moved to a part and before it was opened.
            for journal in [path for path in written(job) if path.suffix == ".jsonl"]:
                os.truncate(journal, max(0, journal.stat().st_size - rng.randrange(1, 30)))
    finish(start(job, **options))
    if out == "rows.jsonl":
        assert Path(job.out).read_bytes() == captions
    else:
        assert by_id(rows_in(job.out)) == by_id(parsed(captions))
    assert run(job).rows == 0, "nothing is left"
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "processes that decode have outlived the one that was killed"
        time.sleep(0.1)


def written(job: BulkJob) -> list[Path]:
    """Return the files that hold rows."""
    out = Path(job.out)
    files = list(out.glob("*[0-9]*")) if out.suffix == ".parquet" else [out, *out.parent.glob(f"{out.name}.rank-*")]
    return [path for path in files if path.exists() and path.suffix != ".unfinished"]


def ids_of(job: BulkJob) -> set[str]:
    """Return the ids of the complete rows on disk; other processes may be writing."""
    found: set[str] = set()
    for path in written(job):
        try:
            if path.suffix == ".parquet":
                found |= set(needs("pyarrow.parquet", "parquet").read_table(path, columns=["id"])["id"].to_pylist())
            else:
                found |= {json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]}
        except FileNotFoundError:  # moved in between
            continue
    return found


def children_of(pid: int) -> list[str]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return file.read_text().split() if file.exists() else []


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_at(job: BulkJob, processes: list[Any], count: int) -> list[str]:
    """Kill processes when `count` rows are on disk.

    Returns:
        The child processes of the killed ones, if `/proc` lists them.
    """
    deadline = time.monotonic() + PATIENCE
    while len(ids_of(job)) < count:
        assert all(process.is_alive() for process in processes), "a process has ended by itself"
        assert time.monotonic() < deadline, f"no {count} rows after {PATIENCE} seconds"
        time.sleep(0.002)
    started = [child for process in processes for child in children_of(process.pid)]
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    return started


@pytest.fixture
def start_two(start: Start) -> Callable[..., list[Any]]:
    """Start two processes like torchrun, whose own store keeps their port from being taken."""
    stores = []

    def begin(job: BulkJob, **options: Any) -> list[Any]:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        settings = {"world": 2, "port": stores[-1].port, "batch_size": 5, "num_workers": 0, **options}
        return [start(job, rank=rank, **settings) for rank in range(2)]

    return begin


def test_two_processes_share_the_work(make_job: MakeJob, start_two: Callable[..., list[Any]], captions: bytes) -> None:
    """With gloo, two processes are killed, two others resume and are killed, and one finishes the job."""
    job = make_job()
    kill_at(job, start_two(job, hold_at=20), 30)
    assert len([path for path in written(job) if ".rank-" in path.name]) == 2
    kill_at(job, start_two(job, hold_at=20), 60)
    summary = run(job, batch_size=3, num_workers=0)
    assert 0 < summary.rows <= COUNT - 60
    assert summary.rows + summary.before == COUNT
    assert by_id(rows_in(job.out)) == by_id(parsed(captions))
    assert [path.name for path in written(job)] == ["rows.jsonl"]


@NEEDS_PYARROW
def test_two_processes_finish(make_job: MakeJob, start_two: Callable[..., list[Any]], captions: bytes) -> None:
    job = make_job(out="rows.parquet")
    finish(*start_two(job))
    assert by_id(rows_in(job.out)) == by_id(parsed(captions))


@pytest.mark.slow
def test_ray_gives_the_same_rows(
    make_job: MakeJob, captions: bytes, run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers run on a local cluster; the second run resumes a job that was interrupted within a row."""
    ray = needs("ray", "ray")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Ray replaces it, and the handler of SIGTERM
    handler = signal.getsignal(signal.SIGTERM)
    job, lines = make_job(), captions.splitlines(keepends=True)
    for name, value in (("PYTHONPATH", import_path()), ("OMP_NUM_THREADS", "1"), ("RAY_USAGE_STATS_ENABLED", "0")):
        monkeypatch.setenv(name, value)  # for the workers
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=10**8)
    try:
        for already in (0, COUNT // 2):
            if already:
                Path(job.out).write_bytes(b"".join(lines[:already]) + lines[already][:9])
            # With larger batches, Ray merges the blocks of so small a job, and one worker does all of it.
            status, out, err = run_cli("caption", job.input, model=job.model, out=job.out, batch_size=2, ray_workers=2)
            assert status == 0, err
            assert f"{COUNT - already} rows written, {already} existed" in out
            assert by_id(rows_in(job.out)) == by_id(parsed(captions))
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)


def test_other_settings_are_rejected(make_job: MakeJob, images: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text("".join((images / "table.jsonl").read_text().splitlines(keepends=True)[:6]))
    settings = {"input": str(table), "image_root": str(images)}
    job = make_job("ask", **settings)
    run(job, num_workers=0)
    before = Path(job.out).read_bytes()
    with pytest.raises(
        ValueError, match=r"started with other settings.*: num_beams was null, is 3; text was null, is \"W"
    ):
        run(make_job("ask", **settings, num_beams=3, text="Why?"))
    with table.open("a") as file:
        file.write('{"image": "a.png", "question": "What?"}\n')
    with pytest.raises(ValueError, match=r"files was \[\[\"table.jsonl\", \d+\]\], is \[\[\"table.jsonl\", \d+\]\]"):
        run(job)
    assert Path(job.out).read_bytes() == before
    Path(job.out + ".job.json").unlink()
    with pytest.raises(ValueError, match=r"which has rows but no rows.jsonl.job.json"):
        run(job)


def test_strict_stops_and_can_be_resumed(make_job: MakeJob, captions: bytes) -> None:
    job = make_job()
    with pytest.raises(ValueError, match=r"^(00017|sub/00090).png: image .*expected an image file"):
        run(job, batch_size=5, num_workers=0, strict=True)
    assert 0 < len(rows_in(job.out)) < COUNT
    assert all(row["error"] is None for row in rows_in(job.out))
    run(job, batch_size=5, num_workers=0)
    assert by_id(rows_in(job.out)) == by_id(parsed(captions))


def test_new_images_are_added(
    make_job: MakeJob, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.png", "c.png"):
        (folder / name).write_bytes((images / "pictures" / "00001.png").read_bytes())
    job = make_job(input=str(folder))
    run(job, num_workers=0)
    (folder / "a.png").write_bytes((images / "pictures" / "00003.png").read_bytes())
    summary = run(job, num_workers=0)
    assert (summary.rows, summary.before) == (1, 2)
    assert [row["id"] for row in rows_in(job.out)] == ["b.png", "c.png", "a.png"]
    capsys.readouterr()
    run(job, num_workers=0)  # nothing is left to do, and no progress to show
    assert "image/s" not in capsys.readouterr().err


def test_tags(make_job: MakeJob, images: Path, tmp_path: Path, run_cli: Callable) -> None:
    """Tags equal the tagger's own, and a captioning job reads them."""
    tagger = make_tagger("abcdef", [0.5] * 6)
    folder = images / "pictures" / "sub"
    files = sorted(folder.glob("0009*.png"))
    with torch.no_grad():
        good = [file for file in files if f"pictures/sub/{file.name}" not in CORRUPT]
        tagger.tag_thresholds = between(tagger.logits(tagger.preprocess(good)).sigmoid()).tolist()
    tagger.save_pretrained(tmp_path / "ram")
    tagged = tmp_path / "tagged.jsonl"
    status, out, _ = run_cli("tag", folder / "0009*.png", ram=tmp_path / "ram", out=tagged, workers=0)
    assert status == 0
    assert "5 rows written, 0 existed" in out
    assert "1 with an error, first" in out
    rows = rows_in(tagged)
    found = {row["id"]: row["tags"] for row in rows if row["error"] is None}
    assert found == {name: [tag for tag in tagger([name])[0].split(", ") if tag] for name in found}
    assert len({tuple(tags) for tags in found.values()}) > 1
    status, out, _ = run_cli("tag", next(iter(found)), ram=tmp_path / "ram")
    assert (status, out.strip()) == (0, ", ".join(next(iter(found.values()))))
    job = make_job(input=str(tagged), out="captions.jsonl")
    summary = run(job, num_workers=0)
    assert (summary.rows, summary.errors) == (5, 1)


def test_the_command_line_runs_the_same_job(make_job: MakeJob, captions: bytes, run_cli: Callable) -> None:
    job = make_job()
    status, out, err = run_cli("caption", job.input, model=job.model, out=job.out, batch_size=5, workers=1)
    assert status == 0
    assert Path(job.out).read_bytes() == captions
    assert f"{COUNT} rows written, 0 existed" in out
    assert "2 with an error, first 00017.png: image (" in out
    assert f"{COUNT}/{COUNT}" in err
    assert "image/s" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "{images}"], "QUESTION: expected text, got none"),
        (["locate", "{images}"], "EXPRESSION: expected text, got none"),
        (["locate", "{images}", "--out", "a.jsonl", "--output", "a.png"], "--output: expected no image with --out"),
        (["caption", "{images}", "--out", "a.jsonl", "--column", "image"], "--column: expected ROLE=NAME, got image"),
        (
            ["caption", "{images}", "--out", "a.txt"],
            "out: expected a name that ends in .jsonl or .parquet, got a.txt",
        ),
        (["caption", "{images}", "--out", "a.jsonl", "--model", "no"], "model: expected a directory, got no"),
        (["caption", "{images}", "--out", "a.jsonl", "--ray-workers", "1", "--workers", "1"], "--ray-workers: "),
    ],
)
def test_bad_arguments_are_reported_in_one_line(
    images: Path, run_cli: Callable, monkeypatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run_cli(*(argument.format(images=images / "pictures") for argument in arguments))
    assert status == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_batches_have_similar_lengths_and_stay_the_same_on_resumption() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 300, 1000)
    whole = plan_batches(lengths, np.zeros(1000, bool), 8)
    assert np.sort(np.concatenate(whole)).tolist() == list(range(1000))
    assert [len(batch) for batch in whole] == [8] * 125
    spread = [np.ptp(lengths[batch]) for batch in whole]
    assert np.mean(spread) < 15, "lengths are up to 300; random batches have a spread of 233"
    for number, batch in enumerate(whole):
        assert np.ptp(batch) < 8 * 32, number
    done = rng.random(1000) < 0.5
    left = {tuple(batch[~done[batch]].tolist()) for batch in whole} - {()}
    assert {tuple(batch.tolist()) for batch in plan_batches(lengths, done, 8)} == left
    assert plan_batches(lengths, np.ones(1000, bool), 8) == []


def test_captions_equal_single_calls(captions: bytes, images: Path, ask_singly: Callable[..., str]) -> None:
    """Compare every tenth caption with a single call."""
    rows = parsed(captions)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert sum(row["error"] is not None for row in rows) == len(CORRUPT)
    for row in rows[::10]:
        assert row["caption"] == ask_singly(images / "pictures" / row["id"], CAPTION_INSTRUCTION)
