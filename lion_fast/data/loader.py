"""A loader that keeps a GPU busy: pictures are decoded in workers, ahead of the model, into pinned memory."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from lion_fast.data.sampler import LengthGroupedBatchSampler


def make_loader(
    sampler: LengthGroupedBatchSampler,
    collate_fn: Callable[[list[dict[str, Any]]], Any],
    num_workers: int | None = None,
) -> DataLoader:
    """Batches of a sampler's data set, read and collated in worker processes that last from epoch to epoch.

    Data order and augmentation come from the sampler and the data set. Whatever else draws random numbers in a worker
    (`random`, NumPy, torch) is seeded from the sampler's seed and the worker's number, and no number is drawn from the
    process's own generators, so that a training step finds them as it left them.

    Args:
        sampler: says which samples; `sampler.set_epoch(epoch, start)` says where the next iteration begins.
        collate_fn: makes a batch of samples, such as `lambda samples: samples`. It runs in the workers, and is pickled
            where Python starts them afresh.
        num_workers: processes; 0 reads in this one. By default one fewer than the cores that this process may use, or
            than its share of them where torchrun started several.

    Raises:
        ValueError: for a negative number of workers.
    """
    num_workers = checked_workers(num_workers)
    return DataLoader(
        sampler.dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.seed),
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
