"""The ledger: each headline's newest time on each device, with its floor and best peer, or a note that it has none.

A row is the newest comparison at its shape among all runs of a device, with its own commit and date. If that comparison
has no time of ours, the row says so, even if an older one had.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.headline import CPU_HEADLINES, HEADLINES, SUITE, Headline
from benchmarks.harness.results import Entry, Run
from benchmarks.harness.units import percent, time_in_words

EXPECTED = ("NVIDIA H100", "NVIDIA H200")  # GPUs with a table even without runs
MISSING = "not measured yet"
STALLS = (
    "smsp__average_warps_issue_stalled_",
    "smsp__average_warp_latency_issue_stalled_",
    "smsp__pcsamp_warps_issue_stalled_",
)
COUNTERS = {  # descriptions of the profiler's names
    "gpu__time_duration.sum": "time, ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, % of peak",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, % of peak",
    "lts__t_sector_hit_rate.pct": "L2 hits, %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM, % of peak",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe, % of peak",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor pipe, % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, % of what fits",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "CTAs by registers",
    "launch__occupancy_limit_shared_mem": "CTAs by shared memory",
}


@dataclass(frozen=True)
class Row:
    """A headline in one direction.

    Attributes:
        run: the newest that measured it.
        ours: our fastest form; None if none is correct.
        others: number of our other forms.
        peer: the fastest peer; None if none has a time.
    """

    headline: Headline
    direction: str
    run: Run | None = None
    ours: Entry | None = None
    others: int = 0
    peer: Entry | None = None

    @property
    def ratio(self) -> float | None:
        """Our time relative to the best peer's: round by round if that peer is the baseline, else by medians."""
        if self.ours is None or self.peer is None:
            return None
        if self.ours.ratio and self.ours.baseline == self.peer.peer:
            return self.ours.ratio[0]
        return self.ours.seconds[0] / self.peer.seconds[0]


def headlines(run: Run | None) -> tuple[Headline, ...]:
    """Return the headlines for a run's device; None is a GPU without runs."""
    return HEADLINES if run is None or run.environment["gpu"] else CPU_HEADLINES


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return the table of one device from its runs, newest first."""
    lines = headlines(runs[0] if runs else None)
    return [_row(headline, direction, runs) for headline in lines for direction in headline.directions]


def tables(devices: Mapping[str, Sequence[Run]]) -> dict[str, list[Row]]:
    """Return every device's rows, by name; devices without runs come last."""
    waiting = [name for name in EXPECTED if not any(device.startswith(name) for device in devices)]
    return {device: rows(runs) for device, runs in devices.items()} | {name: rows(()) for name in waiting}


def label(entry: Entry) -> str:
    """Return an entry's shape in words; a headline's shape includes its operator, and has the ledger's label."""
    known = (one for one in HEADLINES if entry.suite == SUITE and entry.shape == one.entry_shape)
    return next((f"{one.operator}, {one.label}" for one in known), entry.label)


def write(devices: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """Yield the ledger in Markdown, for runs by device, newest first."""
    for device, table in tables(devices).items():
        yield f"### {device}: ledger\n"
        yield from lines(table)
        counted = next((run.counted for run in devices.get(device, ()) if run.counted), ())
        if counted:
            yield f"**What limits the main kernels on {device}**, by the profiler's counters in one launch of each:\n"
            yield from _counters(counted)


def lines(table: Sequence[Row]) -> Iterator[str]:
    """Yield a table in Markdown."""
    yield "| operator | shape | direction | time | of floor | best peer | ours / peer | commit | date |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in table:
        headline = row.headline
        direction = "" if row.direction == headline.operator else row.direction
        yield f"| {headline.operator} | {headline.label} | {direction} | {' | '.join(_cells(row))} |"
    yield ""


def _row(headline: Headline, direction: str, runs: Sequence[Run]) -> Row:
    for run in runs:
        dtypes = "", "bfloat16" if run.environment["gpu"] else "float32"
        for source in headline.sources:
            if direction not in source.directions:
                continue
            wanted = source.suite, direction, dict(source.shape)
            found = [e for e in run.entries if (e.suite, e.direction, e.shape) == wanted and e.dtype in dtypes]
            if found:
                ours, peers = [e for e in found if e.ours], [e for e in found if not e.ours]
                return Row(headline, direction, run, fastest(ours), max(0, len(ours) - 1), fastest(peers))
    return Row(headline, direction)


def fastest(entries: Sequence[Entry]) -> Entry | None:
    return min(entries, key=lambda entry: entry.seconds[0], default=None)


def _cells(row: Row) -> tuple[str, ...]:
    if row.run is None:
        return MISSING, "", "", "", "", ""
    when = row.run.environment["commit"], row.run.environment["date"]
    peer = f"{row.peer.peer}, {time_in_words(row.peer.seconds[0])}" if row.peer else "none"
    if row.ours is None:
        return "**no correct result**", "", peer, "", *when
    form = f" ({row.ours.peer})" if row.others else ""
    reached = percent(row.ours.reached)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return time_in_words(row.ours.seconds[0]) + form, reached, peer, ratio, *when


def _counters(counted: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one line per kernel: its counters, and the three main reasons why its warps waited."""
    names = [name for name in COUNTERS if any(name in kernel["metrics"] for kernel in counted)]
    stalled = any(name.startswith(STALLS) for kernel in counted for name in kernel["metrics"])
    heads = ["kernel", "operator", *(COUNTERS[name] for name in names)]
    heads += ["waits most for"] if stalled else []
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for kernel in counted:
        metrics = kernel["metrics"]
        cells = [f"`{kernel['kernel']}`", kernel["operator"], *(_value(metrics.get(name)) for name in names)]
        if stalled:
            reasons = {name: value for name, value in metrics.items() if name.startswith(STALLS)}
            most = sorted(reasons, key=lambda name: -reasons[name])[:3]
            cells.append(", ".join(f"{_reason(name)} {_value(reasons[name])}" for name in most))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _reason(name: str) -> str:
    """Shorten the name of a stall: `smsp__average_warps_issue_stalled_NAME_per_issue_active.ratio` to NAME in words."""
    prefix = next(prefix for prefix in STALLS if name.startswith(prefix))
    return name.removeprefix(prefix).split(".")[0].removesuffix("_per_issue_active").replace("_", " ")


def _value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
