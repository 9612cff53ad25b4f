"""Arrays, tensors and files given to `load_image`."""

import random
from pathlib import Path

import numpy as np

from lion_fast.io.images import load_image
from tests.campaign.running import Trial


def make(rng: random.Random, folder: Path) -> Trial:
    shape = [rng.choice([0, 1, 2, 3, 4, 5]) for _ in range(rng.randint(0, 4))]
    dtype = rng.choice(["bool", "int8", "uint16", "float16", "complex64", "object", "U3", "datetime64[s]"])
    return Trial(f"array {shape} of {dtype}", lambda: load_image(np.zeros(shape, dtype)), ["image"])
