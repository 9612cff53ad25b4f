"""The operators of lion_kernels on their kernels, in Triton's interpreter."""

import random
from pathlib import Path

from tests.campaign.operator_calls import make_trial
from tests.campaign.running import Trial


def make(rng: random.Random, folder: Path) -> Trial:
    return make_trial(rng, ("triton",))
