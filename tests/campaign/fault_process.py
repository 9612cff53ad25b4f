"""A server that forks a process for each line of JSON `[JOB, FOLDER, VARIABLES]`, and prints its status.

Jobs read `FOLDER/in` and write `FOLDER/out`. Status 0 is success, and 2 an error of one line in `FOLDER/error`, as of
the command line. The variables are those of `faults.environment`.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lion_fast.conversion.lion import convert_checkpoint
from lion_fast.data import Conversion, JsonlDataset, ShardDataset, write_jsonl, write_shards
from lion_fast.inference.bulk import BulkJob, run, running
from lion_fast.inference.pipeline import LionPipeline
from tests.campaign.outputs import _Answers


def ask(folder: Path, input: str) -> None:
    """Run a bulk job without a model, which takes no time to load."""
    running.load_answerer = _Answers  # type: ignore[assignment]
    text = "What?" if input == "images" else None
    job = BulkJob("ask", str(folder / "in" / input), str(folder / "out" / "rows.jsonl"), str(folder), text)
    run(job, num_workers=0, batch_size=2)


def read_all(dataset: Any) -> None:
    for index in range(len(dataset)):
        dataset[index]


def convert_original(folder: Path) -> None:
    inside = folder / "in" / "original"
    out = folder / "out" / "lion"
    convert_checkpoint(inside / "vit.pth", inside / "llm", inside / "bert", inside / "lion.pth", out)


def train(folder: Path) -> None:
    """Train six steps with three checkpoints, or resume the run."""
    from lion_fast.training.run import train
    from tests.lion_fast.training.runs import recipe_maker

    inside, run_dir = folder / "in", folder / "out" / "run"
    recipe = recipe_maker(run_dir.parent, inside / "lion")(1, f"data.train.image_level=['{inside / 'train.jsonl'}']")
    train(recipe, resume=run_dir.exists())


JOBS: dict[str, Callable[[Path], object]] = {
    "bulk": lambda folder: ask(folder, "table.jsonl"),
    "bulk of Parquet": lambda folder: ask(folder, "table.parquet"),
    "bulk of a tar file": lambda folder: ask(folder, "table.tar"),
    "bulk of images": lambda folder: ask(folder, "images"),
    "data convert": lambda folder: write_jsonl(
        Conversion("gqa", [folder / "in" / "gqa.json"]), folder / "out" / "train.jsonl", overwrite=False
    ),
    "data shards": lambda folder: write_shards(JsonlDataset(folder / "in" / "train.jsonl"), folder / "out" / "shards"),
    "training data": lambda folder: read_all(JsonlDataset(folder / "in" / "train.jsonl")),
    "training data, skip_bad": lambda folder: read_all(JsonlDataset(folder / "in" / "train.jsonl", strict=False)),
    "shards": lambda folder: read_all(ShardDataset(folder / "in" / "shards")),
    "checkpoint": lambda folder: LionPipeline(folder / "in" / "lion"),
    "convert": convert_original,
    "train": train,
}


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    if os.environ.get("LION_SLOW_TESTS"):
        import lion_fast.training.run  # noqa: F401
    gc.freeze()  # so that garbage collection in the forked processes skips the libraries' objects
    for line in sys.stdin:
        job, folder, variables = json.loads(line)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # standard output is the server's
            os.environ |= variables
            os._exit(attempt(JOBS[job], Path(folder)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def attempt(job: Callable[[Path], object], folder: Path) -> int:
    with (folder / "error").open("w") as sys.stderr:
        try:
            job(folder)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    main()
