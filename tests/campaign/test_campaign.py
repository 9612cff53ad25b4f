"""The campaigns: some hundreds of trials of every boundary, or with `LION_SLOW_TESTS` a hundred thousand in all.

`LION_CAMPAIGN_SEED` is the first seed. A bad outcome repeats with `run_trial(boundary, seed)`.
"""

import os

import pytest

from tests.campaign.running import run_campaign

# Trials of each boundary, by the time that one takes and the variety of its inputs.
COUNTS: dict[str, int] = {
    "calls": 200,
    "checkpoints": 40,
    "converting": 200,
    "folders": 150,
    "images": 400,
    "operators": 300,
    "operators_interpreted": 40,
    "originals": 100,
    "processor": 300,
    "recipes": 80,
    "run_folders": 100,
    "shard_indices": 150,
    "tables": 200,
    "tar_files": 200,
    "training_records": 100,
    "outputs": 60,
    "page_requests": 60,
    "tagging": 60,
}
SLOW = bool(os.environ.get("LION_SLOW_TESTS"))


@pytest.mark.parametrize("boundary", COUNTS)
def test_every_trial_succeeds_or_names_what_is_wrong(boundary: str) -> None:
    count = COUNTS[boundary] * (50 if SLOW else 1)
    first = int(os.environ.get("LION_CAMPAIGN_SEED", "0"))
    bad = run_campaign(boundary, range(first, first + count))
    assert not bad, "\n".join([f"{len(bad)} of {count} outcomes are bad", *map(str, bad[:20])])
