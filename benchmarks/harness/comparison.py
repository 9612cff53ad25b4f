"""A comparison of two runs: regressions beyond both runs' spread."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.harness.results import Entry, Run

# Smaller changes of a median are noise, even if the spread within a run is smaller.
LEAST_CHANGE = 0.03


@dataclass(frozen=True)
class Change:
    """One time of this project in both runs.

    Attributes:
        before, after: in seconds, or as a share of the same baseline's time in the same run.
        threshold: above it, `after` is a regression.
    """

    entry: Entry
    before: float
    after: float
    threshold: float
    relative_to: str | None

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def regressed(self) -> bool:
        return self.after > self.threshold


def compare(before: Run, after: Run) -> list[Change]:
    """Return every time of this project's peers that both runs have, with the largest slowdowns first.

    If both runs have the ratio to the same baseline, the ratios are compared, because a busy machine affects them less
    than times. The threshold is the first run's median plus the ranges between the 20 % and 80 % quantiles of both
    runs, and at least 3 % above that median.

    Raises:
        ValueError: the runs are of different devices, or of different suites and shapes.
    """
    if before.device != after.device:
        raise ValueError(f"expected two runs on one device, got {before.device!r} and {after.device!r}")
    old = {_key(entry): entry for entry in before.entries if entry.ours}
    changes = [_change(old[_key(entry)], entry) for entry in after.entries if entry.ours and _key(entry) in old]
    if not changes and not missing(before, after):
        raise ValueError("expected times of the same suites and shapes in both runs, got none")
    return sorted(changes, key=lambda change: -change.factor)


def _key(entry: Entry) -> tuple[str, str, str, str]:
    return entry.suite, entry.group, entry.peer, entry.dtype


def _change(before: Entry, after: Entry) -> Change:
    old, new, relative_to = before.seconds, after.seconds, None
    if before.ratio is not None and after.ratio is not None and before.baseline == after.baseline:
        old, new, relative_to = before.ratio, after.ratio, before.baseline
    spread = (old[2] - old[1]) + (new[2] - new[1])
    return Change(after, old[0], new[0], old[0] + max(spread, LEAST_CHANGE * old[0]), relative_to)


def missing(before: Run, after: Run) -> list[Entry]:
    """Return our times that the second run's suites lack; wrong results have none."""
    suites = {entry.suite for entry in after.entries}
    there = {_key(entry) for entry in after.entries}
    return [entry for entry in before.entries if entry.ours and entry.suite in suites and _key(entry) not in there]


def lines(changes: list[Change]) -> Iterator[str]:
    """Yield a table of the changes beyond their threshold, in both directions."""
    for change in changes:
        faster = change.after < 2 * change.before - change.threshold
        if not (change.regressed or faster):
            continue
        word = "SLOWER" if change.regressed else "faster"
        values = f"{change.before:.3g} -> {change.after:.3g}"
        unit = f"of {change.relative_to}" if change.relative_to else "s"
        yield f"{word} {change.factor:5.2f}x  {values} {unit}  {change.entry.group}: {change.entry.peer}"
