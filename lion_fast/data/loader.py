"""A loader that keeps a GPU busy: pictures are decoded in workers, ahead of the model, into pinned memory."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from lion_fast.data.order import ProcessBatches, TrainingData, TrainingOrder


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
) -> DataLoader:
    """The batches of one process in the order of a run, read and collated in worker processes.

    No number is drawn from the process's own generators, so that a training step finds them as it left them.

    Args:
        order: says which samples.
        collate_fn: makes a batch of samples, such as `lambda samples: samples`. It runs in the workers, and is pickled
            where workers are not forked.
        batch_size: samples of a batch; by default this process's share of a step.
        rank, world_size: which process this is, of how many.
        start: step to begin at.
        num_workers: processes; 0 reads in this one. By default one fewer than the cores that this process may use, or
            than its share of them where torchrun started several.
        prefetch: batches that each worker is ahead.

    Raises:
        ValueError: for a negative number of workers, no batch ahead, or what `ProcessBatches` refuses.
    """
    num_workers = checked_workers(num_workers)
    if prefetch < 1:
        raise ValueError(f"prefetch: expected 1 or more, got {prefetch}")
    size = max(1, order.batch_size // max(world_size, 1)) if batch_size is None else batch_size
    return DataLoader(
        TrainingData(order.samples, order.seed),
        batch_sampler=ProcessBatches(order, size, rank=rank, world_size=world_size, start=start),  # type: ignore[arg-type]
        collate_fn=collate_fn,
        num_workers=num_workers,
        multiprocessing_context=start_method() if num_workers else None,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(order.seed),
    )


def checked_workers(num_workers: int | None) -> int:
    """How many processes read: by default one fewer than this process's share of the cores that it may use.

    Raises:
        ValueError: for a negative number.
    """
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)
    if num_workers < 0:
        raise ValueError(f"num_workers: expected 0 or more, got {num_workers}")
    return num_workers


def start_method() -> str | None:
    """How workers are started: on Linux forked, so that they are there at once, and end when this process is killed.

    Those of a server of forks, from which Python 3.14 and newer starts them by itself, hold the end of the pipe whose
    closing would tell that server: they and it outlive a process that is killed.
    """
    return "fork" if sys.platform == "linux" else None
