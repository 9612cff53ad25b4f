"""Kills and errors of the kernel at random file operations: nothing is lost, and the next run gives the same bytes.

With `LION_SLOW_TESTS`, 200 in all. The processes are forked from one that has imported everything.
"""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.campaign import faults
from tests.lion_fast.processes import import_path

# Forks a process for each line `WRITER FOLDER AT FAULT`, and prints its status.
SERVER = """
import os, sys
from pathlib import Path
from tests.campaign import fault_process
for line in sys.stdin:
    writer, folder, at, fault = line.split()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.environ["LION_FAULT_FOLDER"] = folder + "/out"
        if at != "0":
            os.environ |= {"LION_FAULT_AT": at, "LION_FAULT": fault}
        else:
            os.environ["LION_FAULT_COUNT"] = folder + "/count"
        sys.stderr = open(folder + "/error", "w")
        status = fault_process.main(writer, Path(folder))
        sys.stderr.close()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
COUNT = 200 if os.environ.get("LION_SLOW_TESTS") else 10


def prepare(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(folder / f"{number}.png")
    record = {"task": "image_level", "answer": "a"}
    lines = [{"image": f"{n % 3}.png", "question": "What" + "?" * (9 - n)} for n in range(9)]
    (folder / "table.jsonl").write_text("".join(json.dumps({**line, "id": n}) + "\n" for n, line in enumerate(lines)))
    (folder / "train.jsonl").write_text("".join(json.dumps(line | record) + "\n" for line in lines))
    (folder / "gqa.json").write_text(json.dumps({str(n): {"imageId": str(n), **QUESTION} for n in range(9)}))


QUESTION = {"question": "a?", "answer": "b"}


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".job.json")}


def test_no_fault_loses_anything(tmp_path: Path) -> None:
    library = faults.build(tmp_path)
    environment = faults.environment(library, tmp_path) | {"PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:

        def run(writer: str, folder: Path, at: int = 0, fault: str | int = faults.KILL) -> int:
            assert server.stdin is not None
            assert server.stdout is not None
            print(writer, folder, at, fault, file=server.stdin, flush=True)
            return int(server.stdout.readline())

        expected, counts = {}, {}
        for writer in ("bulk", "convert", "shards"):
            prepare(tmp_path / writer)
            assert run(writer, tmp_path / writer) == 0, (tmp_path / writer / "error").read_text()
            expected[writer] = contents(tmp_path / writer / "out")
            counts[writer] = len((tmp_path / writer / "count").read_bytes())
            assert counts[writer] > 5
        rng = random.Random(int(os.environ.get("LION_CAMPAIGN_SEED", "0")))
        for number in range(COUNT):
            writer = rng.choice(list(expected))
            folder, at = tmp_path / str(number), rng.randint(1, counts[writer])
            fault = rng.choice([faults.KILL, errno.ENOSPC, errno.EIO, errno.EACCES])
            prepare(folder)
            status = run(writer, folder, at, fault)
            what = f"{writer}, operation {at} of {counts[writer]}, {fault}: {(folder / 'error').read_text()}"
            assert status == (-9 if fault == faults.KILL else 2), what
            if fault != faults.KILL:
                assert str(folder / "out") in what.splitlines()[-1], what
                assert "Traceback" not in what, what
            target = {"convert": "train.jsonl", "shards": "shards/index.npz"}.get(writer)
            if target is not None and (folder / "out" / target).exists():  # all is there, or nothing
                assert contents(folder / "out").items() >= expected[writer].items(), what
                continue
            assert run(writer, folder) == 0, f"{what}; then {(folder / 'error').read_text()}"
            assert contents(folder / "out") == expected[writer], what
        assert server.stdin is not None
        server.stdin.close()
