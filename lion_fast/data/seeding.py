"""Seeding of the global random generators from integers: a seed, a position in the run, ..."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators with non-negative integers."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - third-party augmentations draw from the global generator
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators like `seed_everything` in this context, and restore the CPU's generators after it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
