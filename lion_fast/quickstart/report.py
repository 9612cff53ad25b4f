"""The quickstart's report: a table, a grid of images with boxes, and loss curves."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lion_fast.extras import require
from lion_fast.io.atomic import whole_file
from lion_fast.io.boxes import parse_boxes
from lion_fast.quickstart.evaluation import Metrics
from lion_fast.quickstart.loop import Run
from lion_fast.scenes import Sample, Scene
from lion_fast.training.evaluation import is_right

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, MUTED, _GOOD, _BAD = "#1f2933", "#7b8794", "#0b7a4b", "#c0392b"
_PREDICTED, _TRUE = "#ff2d87", "#ffffff"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#cbd2d9",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def pyplot() -> Any:
    """Return matplotlib's pyplot with the backend for files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("quickstart", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@dataclass(frozen=True)
class Showpiece:
    """A scene, drawn large, with the model's caption and its answer to one expression."""

    scene: Scene
    caption: str
    place: Sample
    located: str


def format_table(rows: dict[str, Metrics]) -> str:
    """Format the metrics as a table with one row per evaluation."""
    width = max(map(len, rows))
    lines = [
        f"{'unseen scenes':<{width}}   caption  question  grounding",
        f"{'':<{width}}     exact  accuracy   IoU >= .5",
    ]
    lines.append("-" * len(lines[0]))
    for name, metrics in rows.items():
        shares = (metrics.caption_exact_match, metrics.question_accuracy, metrics.grounding_accuracy)
        lines.append(f"{name:<{width}}" + "".join(f"{share:>10.1%}" for share in shares))
    return "\n".join(lines)


def draw_grid(pieces: Sequence[Showpiece], path: Path, columns: int = 4) -> None:
    """Draw images with the predicted and the true box, the expression above and the predicted caption below."""
    plt = pyplot()
    from matplotlib.lines import Line2D

    rows = -(-len(pieces) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 4.25 * rows), dpi=110, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, piece in zip(axes.flat, pieces, strict=False):
            _draw_piece(axis, piece)
        handles = [
            Line2D([], [], color=_PREDICTED, lw=2.5, label="predicted box"),
            Line2D([], [], color=_INK, lw=2.5, ls=(0, (3, 2)), label="true box"),
        ]
        figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=11)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.955, bottom=0.1, wspace=0.08, hspace=0.36)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png", facecolor="white")
        plt.close(figure)


def _draw_piece(axis: "Axes", piece: Showpiece) -> None:
    size = piece.scene.image.width
    axis.imshow(piece.scene.image)
    axis.axis("off")
    assert piece.place.box is not None
    _draw_box(axis, piece.place.box, size, _TRUE, 4.0, "-")
    _draw_box(axis, piece.place.box, size, _INK, 1.8, (0, (3, 2)))
    for box in parse_boxes(piece.located)[:1]:
        _draw_box(axis, box, size, _PREDICTED, 2.6, "-")
    expression = piece.place.text.split(" locate ")[1].split(" and let me know ")[0]
    found = is_right(piece.located, piece.place.answer)
    axis.set_title(f"“{expression}”", fontsize=10.5, color=_INK if found else _BAD, pad=5)
    right = piece.caption == piece.scene.caption
    caption = "\n".join(textwrap.wrap(piece.caption, 44, max_lines=3))
    axis.text(
        0.5,
        -0.025,
        caption,
        transform=axis.transAxes,
        ha="center",
        va="top",
        fontsize=9,
        color=_GOOD if right else _BAD,
    )


def _draw_box(axis: "Axes", box: Sequence[float], size: int, color: str, width: float, style: object) -> None:
    x1, y1, x2, y2 = (value * size for value in box)
    from matplotlib.patches import Rectangle

    patch = Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width)
    patch.set_linestyle(style)  # type: ignore[arg-type]
    axis.add_patch(patch)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw the loss by step for every part of the training, one line per kind of instruction."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(runs), figsize=(3.3 * len(runs), 3.1), dpi=110, squeeze=False)
        for axis, run in zip(axes.flat, runs, strict=True):
            losses, steps = np.array(run.losses), np.arange(1, len(run.losses) + 1)
            owners = np.array([run.kinds[i % len(run.kinds)] for i in range(len(losses))])
            for color, kind in zip(LINES, dict.fromkeys(run.kinds), strict=False):
                own = owners == kind
                axis.plot(steps[own], losses[own], color=color, alpha=0.22, lw=0.8)
                axis.plot(steps[own], _smoothed(losses[own]), color=color, lw=1.8, label=kind)
            axis.set_yscale("log")
            axis.set_title(f"{run.name} · {run.seconds:.0f} s", fontsize=11, loc="left")
            axis.set_xlabel("step")
            axis.grid(axis="y", color="#e4e7eb", lw=0.7)
            axis.legend(frameon=False, fontsize=9)
        axes[0, 0].set_ylabel("loss (log scale)")
        figure.tight_layout()
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png", facecolor="white")
        plt.close(figure)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the moving average over a twentieth of the run, with a shorter window at both ends."""
    reach = max(1, len(values) // 40)
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])
