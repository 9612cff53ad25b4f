"""The results of the experiment: a file of numbers, a page of tables, and a chart with error bars."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.claims.arms import (
    ARMS,
    BLUR,
    GROUNDING,
    IMAGE_KINDS,
    PLAIN_SENTENCE,
    STAGED,
    TAGGING,
    TRAINED_WRONG,
    WRONG_RATES,
    Arm,
    accuracy_name,
)
from lion_fast.io.atomic import whole_file, write_text
from lion_fast.quickstart.report import LINES, MUTED, STYLE, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# 97.5% quantile of Student's t by degrees of freedom, the number of seeds minus one.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MAX_SEEDS = max(_T) + 1
REPORT_FILES = ("claims.json", "claims.md", "images/claims.png")
_KINDS = {"caption": "caption, exact", "vqa": "question", "rec": "grounding, IoU 0.5"}
_BY_NAME = {arm.name: arm for arm in ARMS}


@dataclass(frozen=True)
class Difference:
    """The difference in accuracy between an arm and its baseline, paired by seed, as shares between 0 and 1.

    Args:
        mean: over the seeds.
        reach: half the width of the mean's 95% confidence interval, by Student's t.
        ahead: number of seeds in which the arm is better.
    """

    mean: float
    reach: float
    ahead: int

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= self.reach:
            return "within noise"
        return "better" if self.mean > 0 else "worse"


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Return the difference between two arms' accuracies [seeds].

    Raises:
        ValueError: fewer than 2 seeds or more than 10.
    """
    if not 2 <= len(ours) <= MAX_SEEDS:
        raise ValueError(f"seeds: expected 2 to {MAX_SEEDS}, got {len(ours)}")
    paired = ours - theirs
    reach = _T[len(paired) - 1] * paired.std(ddof=1) / math.sqrt(len(paired))
    return Difference(float(paired.mean()), float(reach), int((paired > 0).sum()))


@dataclass(frozen=True)
class Comparison:
    """A claim of the paper for one accuracy: the arm should be better than the baseline."""

    arm: str
    baseline: str
    kind: str
    wrong: float | None = None

    def difference(self, results: Sequence[dict[str, Any]]) -> Difference:
        arms = (self.arm, self.baseline)
        ours, theirs = (
            accuracies(results, name, accuracy_name(self.kind, self.wrong if _BY_NAME[name].tag_sentence else None))
            for name in arms
        )
        return difference(ours, theirs)


_STAGED = tuple(Comparison("routers", baseline, kind) for baseline in ("shared", "no-routers") for kind in _KINDS)
_GROUNDING = tuple(Comparison("stage2", arm.name, "rec") for arm in GROUNDING)
_TAGS = tuple(
    Comparison(arm, baseline, kind, wrong)
    for arm, baseline in (("tags", "untagged"), ("soft-prompt", "untagged"), ("soft-prompt", "tags"))
    for kind in IMAGE_KINDS
    for wrong in WRONG_RATES
)


def accuracies(results: Sequence[dict[str, Any]], arm: str, accuracy: str) -> np.ndarray:
    """Return an accuracy per seed, in the order of the results."""
    return np.array([each["accuracy"][accuracy] for each in results if each["arm"] == arm])


def write_report(output_dir: Path, report: dict[str, Any]) -> None:
    """Write `claims.json`, `claims.md` and `images/claims.png`.

    Args:
        output_dir: with a directory `images`.
        report: the return value of `experiment.run`.
    """
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    data, page, chart = REPORT_FILES
    for name, content in ((data, json.dumps(report, indent=1)), (page, format_page(report))):
        write_text(output_dir / name, content.rstrip("\n") + "\n")
    draw(report["results"], output_dir / chart)


def format_page(report: dict[str, Any]) -> str:
    """Return the page of the documentation: the method, the tables, and their limits."""
    settings, results = report["settings"], report["results"]
    seconds = sum(each["cpu_seconds"] for each in results)
    first, second, third = settings["stage_steps"]
    true, wrong = (accuracies(results, "tags", accuracy_name("caption", share)) for share in (0.0, WRONG_RATES[-1]))
    return (
        Path(__file__)
        .with_name("page.md")
        .read_text(encoding="utf-8")
        .format(
            seeds=" ".join(map(str, report["seeds"])),
            count=len(report["seeds"]),
            minutes=f"{seconds / 60:.0f}",
            test_scenes=settings["test_scenes"],
            train_scenes=settings["train_scenes"],
            batch_size=settings["batch_size"],
            first=first,
            second=second,
            third=third,
            all=first + second + third,
            wrong=f"{TRAINED_WRONG:.0%}",
            comparisons=len(_STAGED + _GROUNDING + _TAGS),
            reader_steps=settings["reader_steps"],
            blur=BLUR,
            plain=PLAIN_SENTENCE.format(tags="blue, circle, plain").strip(),
            trained=f"{max(each['trained_parameters'] for each in results) / 1e6:.1f} million",
            staged=_table([a for a in STAGED if a.name in ("routers", "no-routers", "shared")], _KINDS, results),
            staged_differences=_differences(_STAGED, results),
            grounding=_table([_BY_NAME["stage2"], *GROUNDING], ["rec"], results),
            grounding_differences=_differences(_GROUNDING, results),
            read=_points(difference(true, wrong)),
            most_wrong=f"{WRONG_RATES[-1]:.0%}",
            tags=_tags_table(results),
            tags_differences=_differences(_TAGS, results),
        )
    )


def _cell(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1):.1f}"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def _table(arms: Sequence[Arm], kinds: Sequence[str] | dict[str, str], results: Sequence[dict[str, Any]]) -> str:
    rows = [["", "image-level samples", "region-level samples", "trained parameters", *(_KINDS[k] for k in kinds)]]
    for arm in arms:
        own = [next(each for each in results if each["arm"] == name) for name in (*arm.after, arm.name)]
        counts = [sum(each[key] for each in own) for key in ("image_level_samples", "region_level_samples")]
        numbers = [f"{number:,}" for number in (*counts, own[-1]["trained_parameters"])]
        rows.append([arm.label, *numbers, *(_cell(accuracies(results, arm.name, kind)) for kind in kinds)])
    return _rows(rows)


def _tags_table(results: Sequence[dict[str, Any]]) -> str:
    rows = [["", "tags that are wrong", *(_KINDS[kind] for kind in IMAGE_KINDS)]]
    for arm in (_BY_NAME["blurred"], *TAGGING):
        for wrong in WRONG_RATES if arm.tag_sentence else (None,):
            cells = [_cell(accuracies(results, arm.name, accuracy_name(kind, wrong))) for kind in IMAGE_KINDS]
            rows.append([arm.label, "" if wrong is None else f"{wrong:.0%}", *cells])
    return _rows(rows)


def _differences(comparisons: Sequence[Comparison], results: Sequence[dict[str, Any]]) -> str:
    rows = [["", "against", "", "difference, points", "ahead in seeds", ""]]
    for comparison in comparisons:
        ours, theirs = _BY_NAME[comparison.arm], _BY_NAME[comparison.baseline]
        found = comparison.difference(results)
        of = _KINDS[comparison.kind] + ("" if comparison.wrong is None else f", {comparison.wrong:.0%} wrong")
        rows.append([ours.label, theirs.label, of, _points(found), str(found.ahead), found.verdict])
    return _rows(rows)


def _points(found: Difference) -> str:
    return f"{100 * found.mean:+.1f} ± {100 * found.reach:.1f}"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw means as bars with standard deviations over the seeds, and every seed as a point."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), dpi=120, width_ratios=(1.35, 1))
        staged = ("routers", "no-routers", "shared")
        _draw_groups(axes[0, 0], results, staged, list(_KINDS))
        axes[0, 0].set_title("Staged training with a mixture of adapters", loc="left", fontsize=11)
        _draw_groups(axes[0, 1], results, ("stage2", *(arm.name for arm in GROUNDING)), ["rec"])
        axes[0, 1].set_title("Vision aggregator (stage 2)", loc="left", fontsize=11)
        for axis, kind in zip(axes[1], IMAGE_KINDS, strict=True):
            _draw_tags(axis, results, kind)
            axis.set_title(f"Tags, vision blurred (stage 1): {_KINDS[kind]}", loc="left", fontsize=11)
        for axis in axes.flat:
            axis.grid(axis="y", color="#e4e7eb", lw=0.7)
            axis.set_axisbelow(True)
            axis.set_ylabel("right, %")
        figure.tight_layout(h_pad=2.5, w_pad=2)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png", facecolor="white")
        plt.close(figure)


def _draw_groups(axis: "Axes", results: Sequence[dict[str, Any]], arms: Sequence[str], kinds: Sequence[str]) -> None:
    """Draw one group of bars per kind, with one bar per arm."""
    width = 0.8 / len(arms)
    for number, (name, color) in enumerate(zip(arms, LINES, strict=False)):
        label = _CHART_LABELS[name]
        for place, kind in enumerate(kinds):
            values, x = 100 * accuracies(results, name, kind), place + (number - (len(arms) - 1) / 2) * width
            axis.bar(x, values.mean(), 0.86 * width, color=color, alpha=0.35, label=label if place == 0 else None)
            axis.errorbar(x, values.mean(), values.std(ddof=1), color=color, capsize=5, lw=1.6)
            _draw_points(axis, x, values, color, 0.18 * width)
    axis.set_xticks(range(len(kinds)), [_KINDS[kind] for kind in kinds])
    axis.set_xlim(-0.5, len(kinds) - 0.5)
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(arms))


def _draw_tags(axis: "Axes", results: Sequence[dict[str, Any]], kind: str) -> None:
    without = 100 * accuracies(results, "untagged", kind)
    low, high = without.mean() - without.std(ddof=1), without.mean() + without.std(ddof=1)
    axis.axhspan(low, high, color=MUTED, alpha=0.18, lw=0)
    axis.axhline(without.mean(), color=MUTED, lw=1.6, ls=(0, (4, 3)), label="no tags")
    shift = 0.006 * 100
    for arm, color, side in zip(TAGGING[1:], LINES, (-shift, shift), strict=False):
        values = 100 * np.array([accuracies(results, arm.name, accuracy_name(kind, wrong)) for wrong in WRONG_RATES])
        places = 100 * np.array(WRONG_RATES) + side
        axis.errorbar(
            places, values.mean(1), values.std(1, ddof=1), color=color, capsize=5, lw=1.8, marker="o", label=arm.label
        )
        for x, each in zip(places, values, strict=True):
            _draw_points(axis, x, each, color, 0.4)
    axis.set_xticks([100 * wrong for wrong in WRONG_RATES], [f"{wrong:.0%}" for wrong in WRONG_RATES])
    axis.set_xlabel(f"tags that are wrong (in training {TRAINED_WRONG:.0%})")
    axis.legend(frameon=False, fontsize=9)


def _draw_points(axis: "Axes", x: float, values: np.ndarray, color: str, spread: float) -> None:
    places = x + np.linspace(-spread, spread, len(values))
    axis.scatter(places, values, s=12, color=color, edgecolors="white", linewidths=0.5, zorder=3)


_CHART_LABELS = {
    "routers": "staged, routers",
    "no-routers": "staged, no routers",
    "shared": "mixed data, one adapter",
    "stage2": "aggregator",
    "last-layer": "last layer alone",
    "qformer": "Q-Former alone",
}
