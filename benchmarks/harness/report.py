"""Generation of docs/benchmarks.md: ledger, tables and charts of each device's newest run, and a cost model of GPUs.

The page lists every comparison that a peer wins.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import charts, ledger, scaling
from benchmarks.harness.results import Entry, Run, load_all
from benchmarks.harness.units import percent, size_in_words, time_in_words
from lion_fast.io.atomic import write_text

LEDGER = """\
# Benchmarks

`python -m benchmarks.harness report` generates this page from `benchmarks/results`.

## Ledger

The ledger has one row for each operator at LION's sizes, and for the whole model, on each device.

- *time*: the fastest of our implementations.
- *of floor*: the device's lower bound divided by our time; 100% means that the bound is reached.
- *best peer*: the fastest implementation that is not ours.
- *ours / peer*: our time divided by the peer's. **Below 1, ours is faster.**

Each row shows its newest measurement and the commit of that measurement, in fp32 on a CPU and in bf16 on a GPU. Rows
without a measurement say so.
"""

HEAD = """\
## How it is measured

- **Order.** Peers take turns within one run on the same inputs, in reverse order every second round.
- **Correctness.** Each result is checked against the fp64 reference before it is timed. A wrong result gets no time.
- **Statistics.** Times are medians with the 20 % and 80 % quantiles. A ratio is the median of the ratios of each round,
  so that other load on the machine cancels.
- **Floor.** The lower bound of the time: the bytes that must move and the operations to do, at the copy bandwidth and
  the matrix rate measured in the same run. Small inputs stay in a faster cache and can beat it. The whole model's floor
  counts only the matrix products and their weights.
- **Memory.** *peak* is the most memory that forward and backward hold beyond their inputs. *kept* is what forward keeps
  for backward.
- **Clock.** On a GPU, operators are timed as CUDA graphs with device events and a cold cache. On a CPU, the wall clock
  is used, or the processor time of single-threaded code, with warm caches.
- **Compilers.** `torch.compile` and FlexAttention take long to compile, so they are measured at a few shapes on a GPU
  and at one on a CPU.

```
python -m benchmarks.harness run rms_norm --quick --out runs/bench   # a smoke run of one suite
python -m benchmarks.harness report --results runs/bench --page runs/benchmarks.md
lion-fast bench --tune --dry-run                        # list what can be tuned
```

Without `--quick`, `run` measures; without a suite, it runs all suites; without `--out`, it writes to
`benchmarks/results`. `report` then generates this page and the figures in the README, the changelog and the docs.
`python -m benchmarks.harness compare A B` fails if one of our times changed from A to B by more than the spread of both
runs. `lion-fast bench --tune` finds the fastest tile sizes for a GPU and writes the table that the kernels read.
`benchmarks/gpu.sh OUT` runs everything that needs a GPU ([GPU measurements](gpu.md)). The benchmarks need a clone of
the repository.
"""

AIMS = """\
**Targets on an H200 in bf16**{measured}:

- mixture of adapters: forward at 85 % of its floor, 6x eager and 2.5x `torch.compile`; backward at 75 % of its floor;
- attention at 257 x 88: at least 1.25x the best peer; T5's attention: at least as fast as FlexAttention;
- a training step of LION-FlanT5-XL on 16 and on 64 images: 3x the original's eager speed and 1.5x that of
  `torch.compile`, in 60 % of its memory, at half of the matrix rate.
"""


_STEP = "training_step"  # prefix of these suites' names


def write_report(results: Path, page: Path) -> list[Path]:
    """Write `page` and the charts (images/bench_*.png beside it, shown in the operators' pages), and return all files.

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
        text.append(
            "**Nothing has run on a GPU yet.** All numbers about GPUs below come from a cost model and say so.\n"
        )
    text.append(AIMS.format(measured="" if on_gpu else " (none measured yet)"))
    for number, run in enumerate(runs):
        drawn = charts.draw(run, images, f"bench_{number}_")
        files += drawn.values()
        text += list(_sections(run, drawn | operators))
    files.append(charts.draw_model(images))
    text += list(_model())
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n".join(text).rstrip() + "\n")
    return [page, *files]


def summary(run: Run) -> Iterator[str]:
    """Yield our best form in every comparison: its time, its share of the baseline's, and its share of the floor."""
    yield f"{'median':>10} {'of baseline':>12} {'floor':>6}  {run.title}"
    for group, entries in _groups(run).items():
        if best := ledger.fastest([entry for entry in entries if entry.ours]):
            time, reached = time_in_words(best.seconds[0]), percent(best.reached)
            yield f"{time:>10} {_ratio(best):>12} {reached:>6}  {group}: {best.peer}"


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
    for name, words in (("peers", "Speed relative to each peer"), ("floors", "Share of the floor reached")):
        if name in drawn:
            yield f"![{words}](images/{drawn[name].name})\n"
    yield from _growth(run, drawn)
    yield from _tables(run, drawn)


def _original(run: Run, drawn: dict[str, Path]) -> Iterator[str]:
    entries = [entry for entry in run.entries if entry.suite == "original" or charts.headline(entry)]
    ours = [entry for entry in entries if entry.ours and entry.ratio]
    if not ours:
        return
    yield "### The PyTorch backend against the original's eager form\n"
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
    yield "### A training step against the original's eager form and `torch.compile`\n"
    yield (
        "| | peer | a step (20 to 80 %) | images per second | of the original's time | peak memory | of the original's "
        "| of the matrix rate |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for entry in entries:
        base = next((other for other in entries if (other.group, other.peer) == (entry.group, entry.baseline)), None)
        memory = entry.peak_bytes / base.peak_bytes if base and base.peak_bytes and entry.peak_bytes else None
        yield (
            f"| {entry.label} | {entry.peer} | {_times(entry)} | {entry.other['images_per_second']:.1f} | "
            f"{_ratio(entry)} | {size_in_words(entry.peak_bytes)} | {percent(memory)} | {percent(entry.reached)} |"
        )
    yield ""


def _profile(entry: Entry, base: Entry) -> str:
    """Return the time of both forms by kind, and the lowest possible ratio, if only the products took time."""
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
            f" Matrix products take {products:.0%} of our time. The original computes the same products with the same "
            f"library, so if everything else took no time, the ratio would be {products * entry.ratio[0]:.2f}. "
            f"{entry.other.get('tried', '')}"
        ).rstrip()
    return text + "\n"


def _times(entry: Entry) -> str:
    median, low, high = map(time_in_words, entry.seconds)
    return f"{median} ({low} to {high})"


def _ratio(entry: Entry) -> str:
    return f"{entry.ratio[0]:.2f}" if entry.ratio else ""


def _baseline(run: Run, entry: Entry) -> Entry:
    return next(other for other in run.entries if (other.group, other.peer) == (entry.group, entry.baseline))


def _groups(run: Run) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in run.entries:
        groups.setdefault(entry.group, []).append(entry)
    return groups


def _wins(run: Run) -> Iterator[str]:
    """Yield every comparison that our best form loses by more than the spread."""
    lost = []
    compared = 0
    for entries in _groups(run).values():
        best = ledger.fastest([entry for entry in entries if entry.ours])
        peer = ledger.fastest([entry for entry in entries if not entry.ours])
        if not best or not peer or best.suite == "growth":
            continue
        compared += 1
        if peer.seconds[2] < best.seconds[1] or peer.seconds[0] < 0.95 * best.seconds[0]:
            lost.append((best, peer))
    if not compared:
        return
    yield "### Where a peer wins\n"
    yield (
        f"In {len(lost)} of {compared} comparisons a peer is faster than our best implementation, by 5 % or by more "
        "than the spread of both:\n"
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
    if "adapters" in drawn and not run.environment["gpu"]:  # the text describes a CPU's curves
        yield (
            "With few tokens, the cost is that of the weights and the calls; it rises once the traffic of the tokens "
            "outweighs both. The PyTorch backend folds the gate into the up-projection if a sequence has more rows "
            "than the rank, and otherwise adds the adapters one by one. With more adapters, its single product grows "
            "only by their rank, while the eager form passes over all tokens twice more per adapter. The eager form "
            "bends again at 8 adapters, partly because its memory then exceeds what the allocator keeps for the next "
            "call, so the system supplies it again page by page; the rest is unexplained.\n"
        )
    if "growth" in drawn:
        yield f"![A training step by batch and image size](images/{drawn['growth'].name})\n"
        yield (
            "A small model's step grows more slowly than its batch, because the cost of some thousand calls and of "
            "the embedding's gradient is fixed. It grows more slowly than the number of pixels while the text, whose "
            "length is fixed, is most of the work. It bends up as the visual prefix (one token per 14 x 14 pixels) "
            "takes over, because attention grows with the square of its length.\n"
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
            ratio = _ratio(entry) if entry.peer != entry.baseline else ""
            error = f"{entry.error:.0e}" if entry.error is not None else ""
            yield (
                f"| {label} | {entry.peer} | {_times(entry)} | {ratio} | {percent(entry.reached)} | "
                f"{size_in_words(entry.peak_bytes)} | {size_in_words(entry.saved_bytes)} | {error} |"
            )
        yield ""


def _model() -> Iterator[str]:
    step = scaling.joint_step()
    yield "## GPUs, by the cost model\n"
    yield "**Not measured yet.** This section is arithmetic, to be compared with measurements once they exist.\n"
    yield "![The cost model's curves](images/bench_model_of_gpus.png)\n"
    yield (
        "The operators' curves are floors on an H200 (4.3 TB/s copy bandwidth, 790 TFLOP/s in bf16). The adapters' "
        "curves are flat up to about a hundred tokens, where the weights are most of the traffic, and linear after "
        "that. By rank and number of experts they are flat while moving the tokens takes longer than the products, "
        "and rise after that: backward between 128 and 256 inner channels, forward between 256 and 512. Attention "
        "grows with the number of pixels while memory is the limit, and with its square once the products are.\n"
    )
    yield (
        f"Many GPUs: a joint step of LION-FlanT5-XL on {scaling.BATCH} images per GPU is {step.flops / 1e12:.0f} "
        f"TFLOP, which takes {1e3 * step.seconds:.0f} ms at an assumed {scaling.REACHED:.0%} of the matrix rate. Then "
        f"{step.trained_bytes / 1e9:.2f} GB of gradients pass around a ring: over NVLink "
        f"({scaling.NVLINK / 1e9:.0f} GB/s per direction) within a machine of {scaling.GPUS_IN_A_MACHINE} GPUs, and "
        f"over a network of {scaling.NETWORK / 1e9:.0f} GB/s per GPU beyond it, where the lower curve bends. The upper "
        "curve assumes that the exchange overlaps with backward, half of the step.\n"
    )
