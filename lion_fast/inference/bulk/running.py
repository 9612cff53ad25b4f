"""Running a job in one process or in several processes of `torchrun`; for Ray see `lion_fast.inference.bulk.ray`."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from lion_fast.data.loader import checked_workers, rank_and_size, start_method, without_interrupts
from lion_fast.inference.bulk.answering import dtype_of, load_answerer
from lion_fast.inference.bulk.claiming import claimed, expect_output_elsewhere
from lion_fast.inference.bulk.items import Source
from lion_fast.inference.bulk.job import BulkJob, settings_of
from lion_fast.inference.bulk.outputs import ROWS_PER_PART, Journal, Output, Row, open_output
from lion_fast.inference.bulk.preparing import Preparer, readable
from lion_fast.inference.bulk.sources import open_source
from lion_fast.inference.loading import default_device

_BATCHES_PER_WINDOW = 32


@dataclass(frozen=True)
class Summary:
    """Summary of a run; with several processes, of this process.

    Args:
        rows: number of rows written by this run.
        errors: number of these rows with an error; `first_error` is the first one, with its id.
        before: number of rows at the start of the run.
        seconds: time from the first batch to the last.
    """

    rows: int
    errors: int
    first_error: str | None
    before: int
    seconds: float


def run(
    job: BulkJob,
    *,
    batch_size: int = 32,
    num_workers: int | None = None,
    device: torch.device | None = None,
    strict: bool = False,
    overwrite: bool = False,
    rows_per_part: int = ROWS_PER_PART,
) -> Summary:
    """Run a job, or resume it after an earlier run with the same settings.

    Under `torchrun`, the inputs are split among the processes, which must share a file system for the output. Rows of
    a table or of shards are in its order when the job has ended.

    Args:
        batch_size: inputs per batch and process; a batch has inputs of similar length.
        num_workers: processes that read and decode, per model; 0 for none. The default is one fewer than the cores.
        device: device of the model; this process's GPU if available by default.
        strict: whether an unusable input raises an error. Otherwise its row holds the error.
        overwrite: whether an output that is not this job's is replaced; its own is always resumed.
        rows_per_part: rows per file of a Parquet output.

    Raises:
        ValueError: the settings do not match the input or those of the existing output, which is then left as it is;
            with `strict`, a bad input.
        OutputInUseError: another run is writing the output.
        OSError: the input or the model does not exist, a file of many inputs cannot be read or was truncated, or the
            output cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    num_workers = checked_workers(num_workers)
    with process_group() as (rank, world_size):
        device = device or default_device(int(os.environ.get("LOCAL_RANK", "0")))
        source = open_source(job)
        with begun(job, source, dtype_of(job, device), rows_per_part, overwrite) as (output, done):
            batches = plan_batches(source.lengths, done, batch_size)[rank::world_size]
            answer = load_answerer(job, device)
            writer = output.open(rank, world_size)
            _meet(None)
            loader: Any = DataLoader(
                batches,  # type: ignore[arg-type]
                batch_size=None,
                num_workers=num_workers if batches else 0,
                multiprocessing_context=start_method() if num_workers and batches else None,
                # Without a batch size, the workers call it on each entry of the plan.
                collate_fn=Preparer(job, source, answer.encode, answer.reduce),
                pin_memory=device.type == "cuda",
            )
            with without_interrupts():
                prepared = iter(loader)
            label = job.command if world_size == 1 else f"{job.command}, process {rank + 1} of {world_size}"
            how: Any = {"label": label, "strict": strict, "show": rank == 0}
            summary = write_all(map(answer, readable(prepared)), writer, batches, done, **how)
            _meet(None)
            if rank == 0:
                finish(output, source)
            _meet(None)
    return summary


@contextmanager
def begun(
    job: BulkJob, source: Source, dtype: torch.dtype, rows_per_part: int, overwrite: bool
) -> Iterator[tuple[Output, np.ndarray]]:
    """Own the output until the end, settle it, record or compare the settings, and find the inputs that are done.

    The first process holds the lock for all.

    Yields:
        The output, and bool [n]: whether the output has a row for each input.
    """
    job.expect_model()
    expect_output_elsewhere(job, source.tables)
    output = open_output(Path(job.out), tuple(job.row("")), rows_per_part)
    with ExitStack() as stack:
        failure = None
        if rank_and_size()[0] == 0:
            name = str(dtype).removeprefix("torch.")
            try:
                settings = settings_of(job, source.files, name, source.own_ids, source.tables)
                stack.enter_context(claimed(job, output, settings, overwrite=overwrite))
            except (ValueError, OSError) as error:
                failure = error
        failure, size = _meet((failure, len(source)))
        if failure is not None:
            raise failure
        if size != len(source):
            raise ValueError(f"input: expected the same {size} inputs in every process, got {len(source)}")
        ids = set(output.ids())
        done = np.fromiter((str(source.id(index)) in ids for index in range(len(source))), bool, len(source))
        _meet(None)
        yield output, done


def finish(output: Output, source: Source) -> None:
    """Complete the output; called on one process when all have ended."""
    # The rows of tables and shards, which cannot change, have an order; images may have been added to a folder.
    output.finish([source.id(index) for index in range(len(source))], in_order=bool(source.files))


def plan_batches(lengths: np.ndarray, done: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return the indices of the remaining inputs in batches.

    The inputs are split into windows of 32 batches and sorted by length within a window. Inputs that are done are
    removed from the batches afterwards, so runs with the same batch size group the inputs in the same way.

    Args:
        lengths: int32 [n], length of each input's text.
        done: bool [n], whether each input is done.
    """
    batches = []
    window = batch_size * _BATCHES_PER_WINDOW
    for start in range(0, len(lengths), window):
        order = start + np.argsort(lengths[start : start + window], kind="stable")
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            left = batch[~done[batch]]
            if len(left):
                batches.append(left)
    return batches


def write_all(
    answered: Iterable[Sequence[Row]],
    writer: Journal,
    batches: Sequence[np.ndarray],
    done: np.ndarray,
    *,
    label: str,
    strict: bool,
    show: bool = True,
) -> Summary:
    """Append rows as they arrive, show a progress bar, and close the writer.

    Args:
        answered: rows of each batch.
        batches: indices of each batch.
        done: bool [n], whether each input was done before.

    Raises:
        ValueError: with `strict`, a row has an error; this row is not written.
    """
    rows, errors, first_error = 0, 0, None
    total, before = sum(map(len, batches)), int(done.sum())
    began = time.monotonic()
    # Without a terminal, a line every 30 seconds is enough.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    progress = tqdm(
        total=total,
        desc=label,
        unit="image",
        smoothing=0,
        mininterval=interval,
        maxinterval=interval,
        disable=not show or total == 0,
    )
    try:
        with progress:
            for batch in answered:
                bad = [f"{row['id']}: {row['error']}" for row in batch if row["error"] is not None]
                if bad and strict:
                    writer.append([row for row in batch if row["error"] is None])
                    raise ValueError(bad[0])
                writer.append(batch)
                rows += len(batch)
                errors += len(bad)
                first_error = first_error or next(iter(bad), None)
                progress.update(len(batch))
    finally:
        writer.close()
    return Summary(rows, errors, first_error, before, time.monotonic() - began)


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the process group of torchrun in this context, and provide rank and number of processes."""
    joining = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joining:
        # The long timeout lets the fastest process wait for the slowest at the end.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield rank_and_size()
    finally:
        if joining:
            dist.destroy_process_group()


def _meet(word: Any) -> Any:
    """Wait for all processes, and return the first process's `word`."""
    words = [word]
    if rank_and_size()[1] > 1:
        dist.broadcast_object_list(words)
        dist.barrier()
    return words[0]
