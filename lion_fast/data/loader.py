"""A loader that keeps a GPU busy: workers decode images ahead of the model, into pinned memory."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader

from lion_fast.data.order import ProcessBatches, TrainingData, TrainingOrder
from lion_fast.data.records import DataError


def make_loader(
    order: TrainingOrder,
    collate_fn: Callable[[list[dict[str, Any]]], Any],
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    num_workers: int | None = None,
    prefetch: int = 2,
    reduce: Callable[[Image.Image], Image.Image] | None = None,
) -> DataLoader:
    """Return a loader of one process's batches in the order of a run; worker processes read and collate them.

    The loader does not draw from the global generators, so it does not change the random numbers of a training step.

    Args:
        order: order of the samples.
        collate_fn: makes a batch of samples, such as `lambda samples: samples`. It runs in the workers, and is pickled
            if workers are not forked.
        batch_size: samples per batch; by default this process's part of a step.
        rank, world_size: rank of this process and number of processes.
        start: step to start at.
        num_workers: number of worker processes; 0 reads in this process. The default is one fewer than this process's
            share of the available cores.
        prefetch: batches that each worker loads in advance.
        reduce: see `TrainingData`, such as `LionProcessor.resize` if `collate_fn` calls the processor.

    Raises:
        ValueError: negative `num_workers`, `prefetch` below 1, or arguments that `ProcessBatches` rejects.
    """
    num_workers = checked_workers(num_workers)
    if prefetch < 1:
        raise ValueError(f"prefetch: expected 1 or more, got {prefetch}")
    size = max(1, order.batch_size // max(world_size, 1)) if batch_size is None else batch_size
    return DataLoader(
        TrainingData(order.samples, order.seed, reduce),
        batch_sampler=ProcessBatches(order, size, rank=rank, world_size=world_size, start=start),  # type: ignore[arg-type]
        collate_fn=collate_fn,
        num_workers=num_workers,
        multiprocessing_context=start_method() if num_workers else None,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(order.seed),
    )


def checked_workers(num_workers: int | None) -> int:
    """Return the number of worker processes, by default one fewer than this process's share of the available cores.

    Raises:
        ValueError: `num_workers` is negative.
    """
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)
    if num_workers < 0:
        raise ValueError(f"num_workers: expected 0 or more, got {num_workers}")
    return num_workers


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes of `torch.distributed`'s default group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Turn an error of a worker process, whose message is the worker's whole traceback, into one of its last line.

    Raises:
        DataError, OSError: samples or their files cannot be read.
    """
    try:
        yield
    except (DataError, OSError) as error:
        if not str(error).startswith("Caught "):
            raise
        # The frames and the error refer to each other. If they were left to garbage collection, the loader's queues
        # could be freed before its workers are told to end, and it would wait 5 seconds for each of them.
        traceback.clear_frames(error.__traceback__)
        kind = type(error)
        message = str(error).strip().splitlines()[-1]
        for name in (f"{kind.__module__}.{kind.__qualname__}: ", f"{kind.__qualname__}: "):
            message = message.removeprefix(name)
        raise kind(message) from error


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Start processes and threads that Ctrl-C does not reach, so that this process alone decides how to end.

    A terminal sends it to all of them, and a worker that it interrupts while it starts prints a traceback.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # an interrupt that came meanwhile comes now


def start_method() -> str | None:
    """Return the start method of workers: "fork" on Linux, else None for the default.

    Forked workers start at once, and end when this process is killed. Workers of a fork server, the default of Python
    3.14 and newer, hold the end of the pipe whose closing tells the server to end, so server and workers would outlive
    a killed process.
    """
    return "fork" if sys.platform == "linux" else None
