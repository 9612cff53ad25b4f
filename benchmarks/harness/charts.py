"""The report's charts. Times have logarithmic axes, shares start at zero, and values that are not measured say so."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import scaling
from benchmarks.harness.headline import SUITE
from benchmarks.harness.results import DIRECTIONS, Entry, Run
from lion_fast.extras import require
from lion_fast.io.atomic import whole_file

_COLORS = {"ours": "#0b6e4f", "eager": "#b23a48", "original": "#b23a48", "floor": "#6c757d"}
_OTHERS = ("#3a6ea5", "#c77d0a", "#7b4b94", "#4d908e", "#577590", "#9c6644", "#2f3e46", "#d62828")


def draw(run: Run, folder: Path, prefix: str) -> dict[str, Path]:
    """Draw every chart that `run` has results for, as `folder`/`prefix`NAME.png, and return them by name."""
    charts: dict[str, Callable[[Any, Run], bool]] = {
        "original": _original,
        "peers": _peers,
        "floors": _floors,
        "adapters": _adapters,
        "growth": _growth,
    }
    return {name: file for name, chart in charts.items() if (file := _save(folder / f"{prefix}{name}.png", chart, run))}


def draw_operators(runs: Sequence[Run], folder: Path) -> dict[str, Path]:
    """Draw one chart per operator with the times of its peers on all devices, as `folder`/bench_NAME.png, by name.

    The suite of all operators has no chart; its times, one size per operator, are in the ledger.
    """
    entries = [entry for run in runs for entry in run.entries if entry.suite != SUITE]
    timed = [entry for entry in entries if entry.direction in DIRECTIONS]
    files = {}
    for suite in dict.fromkeys(entry.suite for entry in timed):
        file = _save(folder / f"bench_{suite}.png", partial(_operator, suite), runs)
        assert file is not None
        files[suite] = file
    return files


def draw_model(folder: Path) -> Path:
    """Draw the cost model's curves for GPUs."""
    file = _save(folder / "bench_model_of_gpus.png", _model_of_gpus, None)
    assert file is not None
    return file


def _save(file: Path, chart: Callable[[Any, Any], bool], run: Run | Sequence[Run] | None) -> Path | None:
    require("quickstart", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with pyplot.rc_context({**settings, "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False}):
        figure = pyplot.figure(layout="constrained")
        drawn = chart(figure, run)
        if drawn:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as unfinished, unfinished.open("wb") as image:
                figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
        pyplot.close(figure)
    return file if drawn else None


def _of(run: Run, suite: str) -> list[Entry]:
    return [entry for entry in run.entries if entry.suite == suite]


def _original(figure: Any, run: Run) -> bool:
    parts = [entry for entry in _of(run, "original") if entry.ours and entry.ratio]
    mixture = [entry for entry in _of(run, "mixture_of_adapters") if headline(entry)]
    if not parts:
        return False
    figure.set_size_inches(7, 0.55 * len(parts + mixture) + 1.3)
    axes = figure.subplots()
    for place, entry in enumerate(reversed(parts + mixture)):
        median, low, high = entry.ratio or (0, 0, 0)
        axes.barh(place, median, height=0.55, color=_COLORS["ours"])
        axes.errorbar(median, place, xerr=[[median - low], [high - median]], color="black", capsize=3)
        axes.plot([aim(entry)] * 2, [place - 0.38, place + 0.38], color="black", linewidth=2)
        axes.text(0.02, place, f"{median:.2f}", va="center", color="white", fontweight="bold")
    names = [name_of(entry) for entry in reversed(parts + mixture)]
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color=_COLORS["original"], linestyle="--")
    axes.set(xlim=(0, 1.15), xlabel="share of the original's eager time (lower is better); black stroke: aim")
    title = f"PyTorch backend beside the original, {run.device}, fp32"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return True


def headline(entry: Entry) -> bool:
    """Return whether an entry is the mixture of adapters at LION XL's shape and the most tokens measured on a CPU."""
    wanted = {"channels": 2048, "experts": 2, "rank": 64, "tokens": 1280}
    return entry.peer == "lion_kernels-torch" and entry.direction == "forward+backward" and entry.shape == wanted


def aim(entry: Entry) -> float:
    """Return the target share of the original's time."""
    return entry.other.get("aim", 0.6)


def name_of(entry: Entry) -> str:
    return entry.shape.get("part", "mixture of adapters, forward+backward")


def _row_of(entry: Entry) -> str:
    """Return an entry's row in a chart by operators; the suite of all operators has the operator in its shape."""
    return entry.shape["operator"] if entry.suite == SUITE else entry.suite


def _by_operator(figure: Any, entries: Sequence[Entry], inches: tuple[float, float]) -> tuple[Any, list[str]]:
    """Return axes with a row for each operator, as high as the first of `inches`, and the operators from below."""
    operators = list(dict.fromkeys(map(_row_of, entries)))[::-1]
    figure.set_size_inches(8, inches[0] * len(operators) + inches[1])
    axes = figure.subplots()
    axes.set_yticks(range(len(operators)), [operator.replace("_", " ") for operator in operators])
    return axes, operators


def _legend(figure: Any, panels: Iterable[Any], columns: int) -> None:
    """Put a legend of all panels below the chart, with each word once."""
    words = {word: handle for axes in panels for handle, word in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(words.values(), words.keys(), loc="outside lower center", ncols=columns)


def _peers(figure: Any, run: Run) -> bool:
    entries = [entry for entry in run.entries if entry.ratio and entry.peer != entry.baseline and entry.direction]
    if not entries:
        return False
    axes, operators = _by_operator(figure, entries, (0.75, 1.6))
    colors = _colors(sorted({entry.peer for entry in entries}))
    for place, operator in enumerate(operators):
        ratios: dict[str, list[float]] = {}
        for entry in entries:
            if entry.ratio and _row_of(entry) == operator:
                ratios.setdefault(entry.peer, []).append(entry.ratio[0])
        for number, peer in enumerate(sorted(ratios, key=lambda peer: ("lion" not in peer, peer))):
            height = place + (0.3 - 0.6 * number / (len(ratios) - 1) if len(ratios) > 1 else 0)
            speeds = [1 / ratio for ratio in ratios[peer]]
            axes.scatter(speeds, [height] * len(speeds), s=16, alpha=0.7, color=colors[peer], label=peer)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = [step for step in (0.1, 0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= step <= high]
    axes.set_xticks(steps, [f"{step:g}x" for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("speed against eager PyTorch in the same run (right of 1: faster); a dot a shape and direction")
    figure.suptitle(f"Speed beside peers, {run.device}", x=0.01, ha="left", fontsize=10)
    _legend(figure, [axes], 5)
    return True


def _floors(figure: Any, run: Run) -> bool:
    entries = [entry for entry in run.entries if entry.reached]
    if not entries:
        return False
    axes, operators = _by_operator(figure, entries, (0.6, 1.4))
    for place, operator in enumerate(operators):
        for offset, kind in ((0.17, "ours"), (-0.17, "eager")):
            chosen = [e for e in entries if _row_of(e) == operator and (e.ours if kind == "ours" else e.peer == kind)]
            reached = [100 * (entry.reached or 0) for entry in chosen]
            axes.scatter(reached, [place + offset] * len(reached), s=16, alpha=0.6, color=_COLORS[kind], label=kind)
    axes.axvline(100, color="black", linewidth=1)
    words = "floor / time, per cent; a dot a shape and direction (beyond 100: inputs that stay in a cache)"
    axes.set(xlim=(0, None), xlabel=words)
    figure.suptitle(f"Achieved against the floor, {run.device}", x=0.01, ha="left", fontsize=10)
    _legend(figure, [axes], 2)
    return True


def _operator(suite: str, figure: Any, runs: Sequence[Run]) -> bool:
    """Draw one row of panels per device, one panel per direction, one line per shape and one dot per peer."""
    measured = [(run, entries) for run in runs if (entries := [e for e in _of(run, suite) if e.direction])]
    shapes = [list(dict.fromkeys(entry.label for entry in entries)) for _, entries in measured]
    colors = _colors(sorted({entry.peer for _, entries in measured for entry in entries}))
    figure.set_size_inches(10, 1.2 + sum(max(2.4, 0.7 + 0.24 * len(labels)) for labels in shapes))
    ratios = {"height_ratios": [len(labels) + 1 for labels in shapes]}
    panels = figure.subplots(len(measured), len(DIRECTIONS), sharey="row", squeeze=False, gridspec_kw=ratios)
    for row, (run, entries), labels in zip(panels, measured, shapes, strict=True):
        for axes, direction in zip(row, DIRECTIONS, strict=True):
            for entry in (entry for entry in entries if entry.direction == direction):
                place = -labels.index(entry.label)
                median, low, high = (1e3 * seconds for seconds in entry.seconds)
                axes.plot([low, high], [place] * 2, color=colors[entry.peer], alpha=0.5)
                axes.plot(median, place, "o", markersize=4, alpha=0.8, color=colors[entry.peer], label=entry.peer)
                if entry.floor_seconds:
                    floor = 1e3 * entry.floor_seconds
                    axes.plot(floor, place, "|", markersize=9, color=_COLORS["floor"], label="floor of this device")
            axes.set(xscale="log", xlabel="ms", title=direction)
        row[0].set_yticks([-place for place in range(len(labels))], labels)
        row[0].set_ylim(-len(labels) + 0.4, 0.6)
        row[0].set_ylabel(f"{run.device}\n{entries[0].dtype}")
    _legend(figure, panels.flat, 5)
    figure.suptitle(f"{suite}: median and middle 60 %", x=0.01, ha="left", fontsize=10)
    return True


def _adapters(figure: Any, run: Run) -> bool:
    entries = [entry for entry in _of(run, "mixture_of_adapters") if entry.direction == "forward+backward"]
    if not entries:
        return False
    figure.set_size_inches(9.5, 3.2)
    panels = figure.subplots(1, 4, sharey=True)
    base = entries[0].shape
    for axes, axis in zip(panels, ("tokens", "experts", "rank", "channels"), strict=True):
        fixed = {name: value for name, value in base.items() if name != axis}
        chosen = [entry for entry in entries if all(entry.shape[name] == value for name, value in fixed.items())]
        curves = _curves(chosen, axis)
        _plot(axes, curves, _colors(curves))
        floors = sorted({(entry.shape[axis], 1e3 * (entry.floor_seconds or 0)) for entry in chosen})
        axes.plot(*zip(*floors, strict=True), color=_COLORS["floor"], linestyle=":", label="floor of this device")
        _log_axes(axes, sorted({entry.shape[axis] for entry in chosen}), xlabel=axis)
    panels[0].set_ylabel("ms, forward+backward")
    _legend(figure, panels[:1], 4)
    point = ", ".join(f"{name} {value}" for name, value in base.items())
    figure.suptitle(f"Mixture of adapters, measured on {run.device}; elsewhere {point}", x=0.01, ha="left", fontsize=10)
    return True


def _growth(figure: Any, run: Run) -> bool:
    entries = _of(run, "growth")
    if not entries:
        return False
    figure.set_size_inches(8, 3.2)
    for axes, axis in zip(figure.subplots(1, 2), ("batch", "image size"), strict=True):
        chosen = [entry for entry in entries if next(iter(entry.shape)) == axis]
        _plot(axes, _curves(chosen, axis), {"lion_fast": _COLORS["ours"]})
        first = min(chosen, key=lambda entry: entry.shape[axis])
        values = sorted(entry.shape[axis] for entry in chosen)
        power = 1 if axis == "batch" else 2
        guide = [1e3 * first.seconds[0] * (value / values[0]) ** power for value in values]
        words = "proportional to the batch" if power == 1 else "proportional to the pixels"
        axes.plot(values, guide, color=_COLORS["floor"], linestyle=":", label=words)
        _log_axes(axes, values, xlabel=axis, ylabel="ms a training step")
        low, high = axes.get_ylim()
        steps = [step for step in (20, 50, 100, 200, 500, 1000, 2000) if low <= step <= high]
        axes.set_yticks(steps, [str(step) for step in steps])
        axes.legend()
    figure.suptitle(f"A small LION's training step, measured on {run.device}", x=0.01, ha="left", fontsize=10)
    return True


def _model_of_gpus(figure: Any, _: None) -> bool:
    figure.set_size_inches(10, 6)
    panels = figure.subplots(2, 3).flatten()
    axes_of = {"tokens": [2**n for n in range(17)], "experts": [1, 2, 4, 8, 16, 32], "rank": [8, 16, 32, 64, 128, 256]}
    for panel, (axis, values) in zip(panels, axes_of.items(), strict=False):
        times = [scaling.adapters(**{axis: value}) for value in values]
        for number, direction in enumerate(("forward", "backward")):
            panel.plot(values, [1e6 * time[number] for time in times], marker="o", markersize=3, label=direction)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="us", title=f"adapters by {axis}")
        panel.legend()
    batches = [1, 2, 4, 8, 16, 32, 64, 128]
    panels[3].plot(batches, [1e6 * scaling.vision_attention(224, batch) for batch in batches], marker="o", markersize=3)
    panels[3].set(xscale="log", yscale="log", xlabel="batch", ylabel="us", title="a layer's attention by batch")
    sizes = [112, 224, 336, 448, 672, 896]
    panels[4].plot(sizes, [1e6 * scaling.vision_attention(size) for size in sizes], marker="o", markersize=3)
    _log_axes(panels[4], sizes, xlabel="image size", ylabel="us", title="a layer's attention by image size")
    step, gpus = scaling.joint_step(), [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for number, words in enumerate(("exchange waits", "exchange hides behind backward")):
        shares = [100 * scaling.efficiency(count, step)[number] for count in gpus]
        panels[5].plot(gpus, shares, marker="o", markersize=3, label=words)
    panels[5].axvline(scaling.GPUS_IN_A_MACHINE, color=_COLORS["floor"], linestyle=":")
    _log_axes(panels[5], gpus, yscale="linear", ylim=(0, 105), xlabel="GPUs", ylabel="% of linear")
    panels[5].set_title("joint training by GPUs")
    panels[5].legend(loc="lower left")
    figure.suptitle("A MODEL, NOT A MEASUREMENT: floors on an H200 in bf16, and many of them", x=0.01, ha="left")
    return True


def _log_axes(axes: Any, ticks: Sequence[int], yscale: str = "log", **settings: Any) -> None:
    axes.set(xscale="log", yscale=yscale, **settings)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _curves(entries: Iterable[Entry], axis: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return, by peer, the axis' value and the time's median and quantiles in ms."""
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for entry in entries:
        median, low, high = (1e3 * seconds for seconds in entry.seconds)
        curves.setdefault(entry.peer, []).append((entry.shape[axis], median, low, high))
    return {peer: sorted(points) for peer, points in curves.items()}


def _plot(axes: Any, curves: dict[str, list[tuple[float, float, float, float]]], colors: dict[str, str]) -> None:
    for peer, points in curves.items():
        values, medians, lows, highs = zip(*points, strict=True)
        axes.plot(values, medians, marker="o", markersize=3, color=colors[peer], label=peer)
        axes.fill_between(values, lows, highs, color=colors[peer], alpha=0.2)


def _colors(peers: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    others = iter(_OTHERS * 3)
    known = {"eager": _COLORS["eager"], "lion_kernels-torch": _COLORS["ours"], "lion_kernels-triton": "#1b998b"}
    return {peer: known.get(peer) or next(others) for peer in peers}
