"""The page of results, docs/benchmarks.md: the ledger, then tables and charts of each device's newest run, and a model.

It says where a peer wins as plainly as where it does not.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import charts, ledger, scaling
from benchmarks.harness.results import Entry, Run, load_all
from benchmarks.harness.units import size_in_words, time_in_words

LEDGER = """\
# Benchmarks

This page is made by `python -m benchmarks.harness report` from the results in `benchmarks/results`.

## Ledger

What the project is judged by: each operator at the sizes that LION has, and the whole model, on each device. *Time* is
the fastest of ours, *of floor* the least time in which the device could do it as a share of that, *best peer* the
fastest form that is not ours, and *ours / peer* our time as a share of its: **below 1 ours is faster**. Every row is
the newest measurement of its own, with its commit, in fp32 on a CPU and in bf16 on a GPU; a row that nobody has
measured says so.
"""

HEAD = """\
## How it is measured

Peers take turns in one run on the same inputs, forwards in one round and in reverse in the next. A result is checked
against the reference in fp64 before it is timed, and a wrong one has no time. Times are medians, with the 20 % and the
80 % quantile; a ratio is the median of the ratios round by round, so that what else the machine does cancels. *Floor*
is the least time in which the device could do it: the bytes that must move and the operations, by the copy bandwidth
and the matrix rate that it reached in the same run; small inputs stay in a cache that is faster, and pass it. *Peak* is
the most memory that a forward and backward hold beyond their inputs, *kept* what forward keeps for backward. On a GPU,
CUDA graphs of the operators by device events, with a cold cache; on a CPU, the clock, or of a single thread its
processor time, which leaves out what other processes had, with the caches as they are. `torch.compile` and
FlexAttention, which compile for long, are measured at a few shapes on a GPU, at one on a CPU. The whole model's floor
is that of the matrix products and their weights alone.

```
python -m benchmarks.harness run rms_norm --quick --out runs/bench   # one suite to see that it runs
python -m benchmarks.harness report --results runs/bench --page runs/benchmarks.md
lion-fast bench --tune --dry-run                        # what there is to tune
```

Without `--quick` it measures, without a suite everything, and without `--out` into `benchmarks/results`, of which
`python -m benchmarks.harness report` makes this page, and the figures in the README, the changelog and the other pages.
`python -m benchmarks.harness compare A B` fails where a time of ours moved from A to B by more than both runs' spread.
`lion-fast bench --tune` finds a GPU's fastest tile sizes and writes the table that the kernels read.
`benchmarks/gpu.sh OUT` runs everything that wants a GPU ([in a quarter of an hour](gpu.md)). Running needs a clone;
results can be compared anywhere.
"""

AIMS = """\
**Aims on an H200 in bf16**{measured}: adapter mixture forward at least 85 % of its floor, 6x eager and 2.5x
`torch.compile`; backward at least 75 % of its floor; attention at 257 x 88 at least 1.25x the best peer; T5's attention
at least as fast as FlexAttention; a training step of LION-FlanT5-XL on 16 and on 64 pictures 3x the original's eager
speed and 1.5x that of `torch.compile`, in 60 % of its memory, at half of the matrix rate.
"""


_STEP = "training_step"  # how the names of their suites begin


def write_report(results: Path, page: Path) -> list[Path]:
    """Writes `page` and the charts (images/bench_*.png beside it; the operators' pages show theirs), returns all files.

    Raises:
        ValueError: `results` holds no run.
    """
    devices = load_all(results)
    runs = [of_device[0] for of_device in devices.values()]
    if not runs:
        raise ValueError(
            f"{results}: expected DEVICE/DATE-COMMIT/SUITE.json of `python -m benchmarks.harness run`, found none"
        )
    images = page.parent / "images"
    files = []
    operators = charts.draw_operators(runs, images)
    files += operators.values()
    text = [LEDGER, *ledger.write(devices), HEAD]
    on_gpu = any(run.environment["gpu"] for run in runs)
    if not on_gpu:
        text.append("**No GPU has run anything yet**: everything below about GPUs is a model, and says so.\n")
    text.append(AIMS.format(measured="" if on_gpu else ", none of them measured yet"))
    for number, run in enumerate(runs):
        drawn = charts.draw(run, images, f"bench_{number}_")
        files += drawn.values()
        text += list(_sections(run, drawn | operators))
    files.append(charts.draw_model(images))
    text += list(_model())
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    return [page, *files]


def summary(run: Run) -> Iterator[str]:
    """The best of ours in every comparison: its time, its share of the baseline's, and how much of the floor it has."""
    yield f"{'median':>10} {'of baseline':>12} {'floor':>6}  {run.title}"
    for group, entries in _groups(run).items():
        if ours := [entry for entry in entries if entry.ours]:
            best = min(ours, key=lambda entry: entry.seconds[0])
            ratio = f"{best.ratio[0]:.2f}" if best.ratio else ""
            reached = f"{best.floor_seconds / best.seconds[0]:.0%}" if best.floor_seconds else ""
            yield f"{time_in_words(best.seconds[0]):>10} {ratio:>12} {reached:>6}  {group}: {best.peer}"


def _sections(run: Run, drawn: dict[str, Path]) -> Iterator[str]:
    environment = run.environment
    yield f"## {run.device}\n"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "transformers"))
    driver = f", driver {environment['driver']}" if environment["driver"] else ""
    yield (
        f"{environment['date']}, commit {environment['commit']}: {environment['cpu']}, {environment['cpu_threads']} of "
        f"{environment['cpu_cores']} cores used{driver}, Python {environment['python']}, {versions}; load average "
        f"{environment['load_average']} at the start.\n"
    )
    yield from _original(run, drawn)
    yield from _training_steps(run)
    yield from _wins(run)
    for name, words in (("peers", "Speed beside each peer"), ("floors", "Achieved against the floor")):
        if name in drawn:
            yield f"![{words}](images/{drawn[name].name})\n"
    yield from _growth(run, drawn)
    yield from _tables(run, drawn)


def _original(run: Run, drawn: dict[str, Path]) -> Iterator[str]:
    entries = [entry for entry in run.entries if entry.suite == "original" or charts.headline(entry)]
    ours = [entry for entry in entries if entry.ours and entry.ratio]
    if not ours:
        return
    yield "### The PyTorch backend beside the original's eager form\n"
    if "original" in drawn:
        yield f"![Share of the original's time](images/{drawn['original'].name})\n"
    yield "| | original | ours | ratio (20 to 80 %) | aim | | peak memory, original | ours |"
    yield "|---|---|---|---|---|---|---|---|"
    for entry in ours:
        assert entry.ratio is not None
        base = _baseline(run, entry)
        met = "met" if entry.ratio[0] <= charts.aim(entry) else "not met"
        low, high = entry.ratio[1:]
        yield (
            f"| {charts.name_of(entry)} | {time_in_words(base.seconds[0])} | {time_in_words(entry.seconds[0])} | "
            f"**{entry.ratio[0]:.2f}** ({low:.2f} to {high:.2f}) | {charts.aim(entry)} | {met} | "
            f"{size_in_words(base.peak_bytes)} | {size_in_words(entry.peak_bytes)} |"
        )
    yield ""
    for entry in ours:
        if "spent" in entry.other:
            yield _profile(entry, _baseline(run, entry))


def _training_steps(run: Run) -> Iterator[str]:
    entries = [entry for entry in run.entries if entry.suite.startswith(_STEP)]
    if not entries:
        return
    yield "### A training step beside the original's eager form and `torch.compile`\n"
    yield (
        "| | peer | a step (20 to 80 %) | images a second | of the original's time | peak memory | of the original's | "
        "of the matrix rate |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for entry in entries:
        base = next((other for other in entries if (other.group, other.peer) == (entry.group, entry.baseline)), None)
        ratio = f"{entry.ratio[0]:.2f}" if entry.ratio else ""
        memory = f"{entry.peak_bytes / base.peak_bytes:.0%}" if base and base.peak_bytes and entry.peak_bytes else ""
        reached = f"{entry.floor_seconds / entry.seconds[0]:.0%}" if entry.floor_seconds else ""
        yield (
            f"| {entry.label} | {entry.peer} | {time_in_words(entry.seconds[0])} ({time_in_words(entry.seconds[1])} to "
            f"{time_in_words(entry.seconds[2])}) | {entry.other['images_per_second']:.1f} | {ratio} | "
            f"{size_in_words(entry.peak_bytes)} | {memory} | {reached} |"
        )
    yield ""


def _profile(entry: Entry, base: Entry) -> str:
    """Where the time of both forms goes, and by that how far the ratio could fall if all but the products took none."""
    assert entry.ratio is not None
    said = [
        f"{who} spends "
        + ", ".join(f"{share:.0%} in `{name}`" for name, share in one.other["spent"].items() if name != "products")
        for who, one in (("The original", base), ("ours", entry))
    ]
    text = f"**{charts.name_of(entry)}.** {'; '.join(said)}."
    if entry.ratio[0] > charts.aim(entry):
        products = entry.other["spent"]["products"]
        text += (
            f" The products of matrices are {products:.0%} of ours. The original has the same ones, and PyTorch's "
            f"library computes them: if all else took no time, the ratio would be {products * entry.ratio[0]:.2f}. "
            f"{entry.other.get('tried', '')}"
        ).rstrip()
    return text + "\n"


def _baseline(run: Run, entry: Entry) -> Entry:
    return next(other for other in run.entries if (other.group, other.peer) == (entry.group, entry.baseline))


def _groups(run: Run) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in run.entries:
        groups.setdefault(entry.group, []).append(entry)
    return groups


def _wins(run: Run) -> Iterator[str]:
    """Every comparison that the best of ours loses by more than the spread."""
    lost = []
    compared = 0
    for entries in _groups(run).values():
        ours, peers = [e for e in entries if e.ours], [e for e in entries if not e.ours]
        if not ours or not peers or entries[0].suite == "growth":
            continue
        compared += 1
        best = min(ours, key=lambda entry: entry.seconds[0])
        peer = min(peers, key=lambda entry: entry.seconds[0])
        if peer.seconds[2] < best.seconds[1] or peer.seconds[0] < 0.95 * best.seconds[0]:
            lost.append((best, peer))
    if not compared:
        return
    yield "### Where a peer wins\n"
    yield (
        f"In {len(lost)} of {compared} comparisons a peer is faster than the best of ours, by 5 % or by more than both "
        "spread:\n"
    )
    if lost:
        yield "| | best peer | its time | ours | ours / peer |"
        yield "|---|---|---|---|---|"
        for best, peer in sorted(lost, key=lambda pair: -pair[0].seconds[0] / pair[1].seconds[0]):
            theirs, mine = (time_in_words(entry.seconds[0]) for entry in (peer, best))
            factor = best.seconds[0] / peer.seconds[0]
            yield f"| {best.group} | {peer.peer} | {theirs} | {mine} | {factor:.2f} |"
        yield ""


def _growth(run: Run, drawn: dict[str, Path]) -> Iterator[str]:
    if "adapters" not in drawn and "growth" not in drawn:
        return
    yield "### How cost grows, measured\n"
    if "adapters" in drawn:
        yield f"![Mixture of adapters by tokens, experts, rank and channels](images/{drawn['adapters'].name})\n"
    if "adapters" in drawn and not run.environment["gpu"]:  # of a GPU's bends nothing is known before there are some
        yield (
            "Few tokens cost what their weights and the calls cost, whatever their number; the curve bends up where "
            "the tokens' own traffic outweighs them. The PyTorch backend folds the gate into the up-projection where "
            "a sequence has more rows than the rank, and adds the adapters one by one below; with more adapters its "
            "one product grows by their rank alone, where the eager form goes over all tokens twice more for each. The "
            "eager form bends again at 8 adapters, in part because what it holds is then more than the allocator keeps "
            "for the next call, and the system hands it out anew, page by page; the rest is not explained.\n"
        )
    if "growth" in drawn:
        yield f"![A training step by batch and image size](images/{drawn['growth'].name})\n"
        yield (
            "A step of a small model grows less than its batch: what some thousand calls and the gradient of an "
            "embedding cost does not grow. It grows less than the pixels as long as the text, which stays, is most of "
            "the work, and bends up as the prefix (a token for each 14 x 14 pixels) takes over, attention with its "
            "square.\n"
        )


def _tables(run: Run, drawn: dict[str, Path]) -> Iterator[str]:
    suites = dict.fromkeys(entry.suite for entry in run.entries if not entry.suite.startswith(_STEP))
    for suite in suites:
        if suite in ("original", "growth"):
            continue
        entries = [entry for entry in run.entries if entry.suite == suite]
        yield f"### {suite}\n"
        if suite in drawn:
            yield f"![Every peer by shape and direction](images/{drawn[suite].name})\n"
        yield "| | peer | median (20 to 80 %) | of the baseline | floor reached | peak | kept | error |"
        yield "|---|---|---|---|---|---|---|---|"
        for entry in entries:
            label = f"{ledger.label(entry)}, {entry.direction}" if entry.direction else entry.group
            ratio = f"{entry.ratio[0]:.2f}" if entry.ratio and entry.peer != entry.baseline else ""
            reached = f"{entry.floor_seconds / entry.seconds[0]:.0%}" if entry.floor_seconds else ""
            error = f"{entry.error:.0e}" if entry.error is not None else ""
            yield (
                f"| {label} | {entry.peer} | {time_in_words(entry.seconds[0])} ({time_in_words(entry.seconds[1])} to "
                f"{time_in_words(entry.seconds[2])}) | {ratio} | {reached} | {size_in_words(entry.peak_bytes)} | "
                f"{size_in_words(entry.saved_bytes)} | {error} |"
            )
        yield ""


def _model() -> Iterator[str]:
    step = scaling.joint_step()
    yield "## GPUs, by the cost model\n"
    yield "**Not measured yet.** What follows is arithmetic, to be held against measurements once there are some.\n"
    yield "![The cost model's curves](images/bench_model_of_gpus.png)\n"
    yield (
        "The operators' curves are floors on an H200 (copies 4.3 TB/s, multiplies 790 TFLOP/s in bf16). The adapters' "
        "are flat up to about a hundred tokens, where the weights are most of what moves, and a line after that; by "
        "rank and experts they are flat as long as moving the tokens takes longer than the products, and bend where "
        "the products do, backward between 128 and 256 inner channels and forward between 256 and 512. Attention by "
        "image size goes with the pixels while memory is the limit, and with their square once the products are.\n"
    )
    yield (
        f"Many GPUs: a joint step of LION-FlanT5-XL on {scaling.BATCH} pictures a GPU is {step.flops / 1e12:.0f} "
        f"TFLOP, {1e3 * step.seconds:.0f} ms at an assumed {scaling.REACHED:.0%} of the matrix rate, after which "
        f"{step.trained_bytes / 1e9:.2f} GB of gradients go round a ring: over NVLink ({scaling.NVLINK / 1e9:.0f} GB/s "
        f"a direction) within a machine of {scaling.GPUS_IN_A_MACHINE}, over a network of "
        f"{scaling.NETWORK / 1e9:.0f} GB/s a GPU beyond it, which is where the lower curve bends. The upper one lets "
        "the exchange run beside backward, half of the step.\n"
    )
