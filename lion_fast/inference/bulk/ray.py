"""The same job on Ray Data: each worker holds a model on one GPU, and this process writes the rows of all workers."""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from lion_fast.extras import require
from lion_fast.inference.bulk.answering import dtype_of, load_answerer
from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.outputs import ROWS_PER_PART, Row
from lion_fast.inference.bulk.preparing import Prepared, Preparer
from lion_fast.inference.bulk.running import Summary, begun, finish, plan_batches, write_all
from lion_fast.inference.bulk.sources import open_source

_BATCHES_PER_TASK = 8


def run_on_ray(
    job: BulkJob,
    *,
    num_workers: int | None = None,
    batch_size: int = 32,
    threads: int = 2,
    strict: bool = False,
    overwrite: bool = False,
    rows_per_part: int = ROWS_PER_PART,
) -> Summary:
    """Run a job like `run`, on a Ray cluster.

    The cluster is the one that this process is connected to, the one that `RAY_ADDRESS` names, or a new local one.
    Input and model must have the same path on every machine; this machine writes the output. A kill loses the batches
    that workers have received, at most eight per worker, and those queued for them.

    Args:
        num_workers: number of models, each on a GPU, or on a CPU in a cluster without GPUs; by default one per GPU of
            the cluster, or one without GPUs.
        batch_size: inputs per batch.
        threads: threads of each worker that read and decode.
        strict, overwrite, rows_per_part: see `run`.

    Raises:
        ValueError, OSError: as for `run`.
        MissingExtraError: Ray is not installed.
    """
    require("ray", "ray", "ray.data")
    import ray
    import ray.data

    for name, value in (("batch_size", batch_size), ("threads", threads), ("num_workers", num_workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports unless the user enables them
        ray.init()
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        source = open_source(job)
        dtype = dtype_of(job, torch.device("cuda" if gpus else "cpu"))
        with begun(job, source, dtype, rows_per_part, overwrite) as (output, done):
            batches = plan_batches(source.lengths, done, batch_size)
            writer = output.open(0, 1)
            answered: Iterable[Sequence[Row]] = ()
            if batches:
                # Not ray.data.range: its read tasks need CPUs, and workers may hold all of them.
                dataset: Any = ray.data.from_items(
                    list(range(len(batches))), override_num_blocks=math.ceil(len(batches) / _BATCHES_PER_TASK)
                )
                dataset.context.enable_progress_bars = False
                what = ray.put((job, source, batches))
                dataset = dataset.map_batches(
                    _Worker,
                    fn_constructor_kwargs={
                        "what": [what],
                        "threads": threads,
                        "folder": os.getcwd(),
                        "on_gpu": gpus > 0,
                    },
                    batch_size=_BATCHES_PER_TASK,
                    concurrency=num_workers or max(1, gpus),
                    num_cpus=1,
                    num_gpus=1 if gpus else 0,
                )
                answered = _received(dataset)
            summary = write_all(answered, writer, batches, done, label=job.command, strict=strict)
            finish(output, source)
        return summary
    finally:
        if ours:
            ray.shutdown()


class _Worker:
    """A model, and threads that prepare its batches in advance.

    Args:
        what: reference to the job, its source and its batches.
        folder: directory that relative paths start from.
    """

    def __init__(self, what: list, threads: int, folder: str, on_gpu: bool):
        import ray

        os.chdir(folder)
        job, source, self.batches = ray.get(what[0])
        self.answer = load_answerer(job, torch.device("cuda" if on_gpu else "cpu"))
        self.prepare = Preparer(job, source, self.answer.encode, self.answer.reduce)
        self.threads = ThreadPoolExecutor(threads)
        self.ahead = threads + 1

    def __call__(self, batch_numbers: dict[str, np.ndarray]) -> Iterator[dict[str, list[str]]]:
        for prepared in self._prepared(batch_numbers["item"]):
            rows = self.answer(prepared) if prepared.failure is None else prepared.failure
            yield {"rows": [json.dumps(rows)]}

    def _prepared(self, batch_numbers: Iterable[int]) -> Iterator[Prepared]:
        waiting: deque[Future[Prepared]] = deque()
        for number in batch_numbers:
            waiting.append(self.threads.submit(self.prepare, self.batches[number]))
            if len(waiting) > self.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _received(dataset: Any) -> Iterator[list[Row]]:
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        for rows in map(json.loads, block["rows"]):
            if isinstance(rows, str):  # of a batch that could not be prepared
                raise OSError(rows)
            yield rows
