"""Kills, errors of the kernel and other programs at random file operations.

Nothing is lost, the next run gives the same bytes, and errors name the file in one line. With `LION_SLOW_TESTS`, there
are 200 of each kind, and 80 of training.
"""

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lion_fast.data import JsonlDataset, write_shards
from lion_fast.training import saving
from tests.campaign import checkpoints, faults, originals
from tests.lion_fast.processes import import_path
from tests.lion_fast.training.runs import losses_of

SLOW = bool(os.environ.get("LION_SLOW_TESTS"))
SEED = int(os.environ.get("LION_CAMPAIGN_SEED", "0"))
# Jobs, with the number of faults, and that with LION_SLOW_TESTS.
WRITERS = {"bulk": (4, 50), "data convert": (3, 50), "data shards": (3, 50), "convert": (1, 50)}
READERS = {
    "bulk": (4, 25),
    "bulk of Parquet": (3, 25),
    "bulk of a tar file": (3, 25),
    "bulk of images": (2, 25),
    "data convert": (1, 10),
    "data shards": (2, 15),
    "training data": (2, 15),
    "training data, skip_bad": (2, 15),
    "shards": (3, 15),
    "checkpoint": (1, 15),
    "convert": (1, 15),
}
# What is complete once this file is there.
LAST = {
    "data convert": "train.jsonl",
    "data shards": "shards/index.npz",
    "convert": "lion/model.safetensors.index.json",
}


class Jobs:
    """The server of `fault_process`, and the inputs of its jobs."""

    def __init__(self, folder: Path, server: subprocess.Popen):
        self.folder, self.server = folder, server
        self.number = 0

    def prepared(self) -> Path:
        """Return a new folder with the inputs."""
        self.number += 1
        shutil.copytree(self.folder / "made", folder := self.folder / str(self.number))
        return folder

    def run(self, job: str, folder: Path, **variables: str) -> tuple[int, str]:
        """Run a job, and return its status and its error, without progress bars and warnings."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps([job, str(folder), variables]), file=self.server.stdin, flush=True)
        status = int(self.server.stdout.readline())
        lines = (folder / "error").read_text().replace("\r", "\n").splitlines()
        return status, "\n".join(
            line for line in lines if line and "image/s]" not in line and not line.startswith("skipped ")
        )

    def count(self, job: str, on: str) -> tuple[int, Path]:
        """Run a job without a fault; return the number of its operations, and its folder."""
        folder = self.prepared()
        where = {"reads": "in", "writes": "out"}[on]
        status, error = self.run(job, folder, **faults.environment(folder / where, on=on, count=folder / "count"))
        assert status == 0, f"{job}: {error}"
        count = len((folder / "count").read_bytes())
        assert count > 2, job
        return count, folder


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("faults")
    library = faults.build(folder)
    if library is None:
        pytest.skip("needs a C compiler, which is not installed")
    make_inputs(folder / "made" / "in")
    environment = {"LD_PRELOAD": str(library), "PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.campaign.fault_process"],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        yield Jobs(folder, server)
        assert server.stdin is not None
        server.stdin.close()


def make_inputs(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(folder / "images" / f"{number}.png")
    record = {"task": "image_level", "answer": "a"}
    lines = [{"image": f"images/{n % 3}.png", "question": "What" + "?" * (9 - n)} for n in range(9)]
    rows = [{**line, "id": n} for n, line in enumerate(lines)]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text("".join(json.dumps(line | record) + "\n" for line in lines))
    question = {"question": "a?", "answer": "b"}
    (folder / "gqa.json").write_text(json.dumps({str(n): {"imageId": str(n), **question} for n in range(9)}))
    write_shards(JsonlDataset(folder / "train.jsonl"), folder / "shards", shard_bytes=4000)
    with tarfile.open(folder / "table.tar", "w") as tar:
        for number in range(3):
            fields = json.dumps({"question": f"{number}?"}).encode()
            image = (folder / "images" / f"{number}.png").read_bytes()
            for name, content in ((f"{number}.png", image), (f"{number}.json", fields)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet", row_group_size=4)
    for name, content in checkpoints.originals()["t5"].items():
        (folder / "lion" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "lion" / name).write_bytes(content)
    files, states = originals.sources()
    files = files | {f"{name}.pth": originals.saved(state) for name, state in states.items()}
    for name, content in files.items():
        (folder / "original" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "original" / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".job.json")}


def chosen(counts: tuple[int, int]) -> range:
    return range(counts[SLOW])


@pytest.mark.parametrize("job", WRITERS)
def test_no_fault_of_writing_loses_anything(jobs: Jobs, job: str) -> None:
    rng = random.Random(f"{SEED} {job}")
    count, whole = jobs.count(job, "writes")
    expected = contents(whole / "out")
    for _ in chosen(WRITERS[job]):
        folder, at = jobs.prepared(), rng.randint(1, count)
        fault = rng.choice([faults.KILL, faults.KILL, errno.ENOSPC, errno.EIO, errno.EACCES])
        status, error = jobs.run(job, folder, **faults.environment(folder / "out", at, fault))
        what = f"operation {at} of {count}, {fault}: {error}"
        assert status == (-9 if fault == faults.KILL else 2), what
        if fault != faults.KILL:
            assert str(folder / "out") in error, what
            assert ".unfinished" not in error, what
            assert "\n" not in error, what
        if job in LAST and (folder / "out" / LAST[job]).exists():  # all is there, or nothing
            assert contents(folder / "out").items() >= expected.items(), what
            continue
        status, error = jobs.run(job, folder)
        assert status == 0, f"{what}; then {error}"
        assert contents(folder / "out") == expected, what


@pytest.mark.skipif(not SLOW, reason="ten minutes, and test_processes.py kills training: set LION_SLOW_TESTS")
def test_no_fault_of_training_loses_anything(jobs: Jobs) -> None:
    """80 faults while a run of six steps writes three checkpoints and its model; each is resumed to the same bytes."""
    rng = random.Random(f"{SEED} train")
    count, whole = jobs.count("train", "writes")
    expected = trained(whole)
    for number in range(80):
        folder, at = jobs.prepared(), rng.randint(1, count)
        fault = faults.KILL if number < 60 else rng.choice([errno.ENOSPC, errno.EIO, errno.EACCES])
        status, error = jobs.run("train", folder, **faults.environment(folder / "out", at, fault))
        what = f"operation {at} of {count}, {fault}: {error}"
        assert status == (-9 if fault == faults.KILL else 2), what
        if fault != faults.KILL:
            assert str(folder / "out") in error.splitlines()[-1], what
        run_dir = folder / "out" / "run"
        assert not [path for path in saving.checkpoints(run_dir) if saving.damage(path)], what
        status, error = jobs.run("train", folder)
        assert status == 0, f"{what}; then {error}"
        assert trained(folder) == expected, what


def trained(folder: Path) -> tuple[dict[str, bytes], list[float]]:
    """Return the files of a run's model, but for those that hold paths, and its losses."""
    run_dir = folder / "out" / "run"
    files = contents(run_dir / "model")
    return {name: files[name] for name in files.keys() - {"training_args.bin", saving.SEAL}}, losses_of(run_dir)


@pytest.mark.parametrize("job", READERS)
def test_faults_of_reading_are_errors_that_name_the_file(jobs: Jobs, job: str) -> None:
    rng = random.Random(f"{SEED} {job}")
    count, whole = jobs.count(job, "reads")
    expected = rows_of(whole)
    for _ in chosen(READERS[job]):
        folder, at = jobs.prepared(), rng.randint(1, count)
        fault = rng.choice([errno.EIO, errno.EACCES, errno.ESTALE, faults.REMOVE, faults.TRUNCATE])
        status, error = jobs.run(job, folder, **faults.environment(folder / "in", at, fault, on="reads"))
        what = f"operation {at} of {count}, {fault}: {error}"
        assert status in (0, 2), what
        if status == 2:
            assert str(folder / "in") in error, what
            assert "\n" not in error, what
        if fault == faults.TRUNCATE:  # perhaps before anything is read, which is another input
            continue
        assert status == 2 or rows_of(folder).keys() == expected.keys(), what
        for id, row in rows_of(folder).items():
            assert row == expected[id] or str(folder / "in") in row["error"], what


def rows_of(folder: Path) -> dict[str, dict]:
    file = folder / "out" / "rows.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {row["id"]: row for row in rows}
