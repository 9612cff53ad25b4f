"""Visualisation of `insight`: attention maps over the image, and charts of the gates by layer."""

import base64
import html
import io

import numpy as np
from PIL import Image

from lion_fast.configuration_lion import TASKS
from lion_fast.demo.insight import AttentionMap, Gates, Insight
from lion_fast.io.boxes import PALETTE

_MAP_SIDE = 360  # pixels of the longer side
_SHORT, _LONG = 480, 1280  # minimum and maximum of the longer side of a displayed image, in pixels


def for_display(image: Image.Image) -> tuple[Image.Image, float]:
    """Return the image at a size for a screen, and the scale factor for boxes in its pixels."""
    longer = max(image.size)
    scale = min(max(longer, _SHORT), _LONG) / longer
    return (image if scale == 1 else _scaled(image, scale)), scale


def heat_map(image: Image.Image, patches: np.ndarray) -> Image.Image:
    """Draw the weights in colour over the grey image, from dark (zero) to bright (the largest weight).

    Args:
        patches: weights [grid, grid], not negative. Patches are drawn as squares, without interpolation, because each
            has a single weight.
    """
    from matplotlib import colormaps

    base = _scaled(image, _MAP_SIDE / max(image.size))
    strength = patches / max(patches.max(), np.finfo(np.float32).tiny)
    colors = Image.fromarray((colormaps["inferno"](strength)[..., :3] * 255).astype(np.uint8))
    over = colors.resize(base.size, Image.Resampling.NEAREST)
    return Image.blend(base.convert("L").convert("RGB"), over, 0.6)


def gate_chart(gates: Gates, task: str) -> str:
    """Return an SVG of the gates of `task` by layer: lines are means over channels, bands 10th to 90th percentiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    positions, row = np.arange(len(gates.layers)), TASKS.index(task)
    for adapter, name in enumerate(gates.adapters):
        color = np.array(PALETTE[adapter]) / 255
        axes.fill_between(positions, gates.low[:, row, adapter], gates.high[:, row, adapter], color=color, alpha=0.25)
        axes.plot(positions, gates.mean[:, row, adapter], marker="so^v"[adapter % 4], color=color, label=name)
    first_decoder = next((i for i, layer in enumerate(gates.layers) if layer.startswith("decoder")), 0)
    if first_decoder:
        axes.axvline(first_decoder - 0.5, color="0.6", linestyle=":")
    step = 1 + (len(positions) - 1) // 12
    axes.set_xticks(positions[::step], [layer.replace(" ", "\n") for layer in gates.layers[::step]])
    axes.set_xlim(-0.5, len(positions) - 0.5)
    axes.set_ylabel(f"gate for {task}")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(gates.adapters))
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()


def insight_html(image: Image.Image, insight: Insight, gates: Gates, task: str) -> str:
    """Return the insight into one answer as figures with captions in words."""
    parts = ["<h2>What was used for this answer</h2>"]
    if insight.shares:
        words = ", ".join(f"{share:.0%} to the {name}" for name, share in insight.shares.items())
        parts.append(f"<p>Attention of its words: {words}.</p>")
        parts.append(_share_bar(insight.shares))
    parts.append(
        "<h3>Which patches were attended to</h3><p>Bright patches got most of the attention, black ones none. Each "
        "map has its own scale; one square is one patch of the vision tower.</p>"
    )
    parts.append(f'<div class="lion-maps">{"".join(_map_figure(image, shown) for shown in insight.maps)}</div>')
    parts.append(
        "<h3>Which adapters were used</h3><p>The routers multiply each adapter's output in a layer by these gates, one "
        "per channel; they depend on the task only. Line: mean of the channels; band: 10th to 90th percentile.</p>"
    )
    means = gates.mean[:, TASKS.index(task)].mean(0)
    summary = ", ".join(
        f"{name} {round(float(mean), 2) + 0.0:.2f}" for name, mean in zip(gates.adapters, means, strict=True)
    )
    chart = _data_url(gate_chart(gates, task).encode(), "image/svg+xml")
    parts.append(
        _figure(chart, f"Gates by layer for {task}", f"Mean over all layers for {task}: {summary}.", "lion-gates")
    )
    return f'<div class="lion-insight">{"".join(parts)}</div>'


def _share_bar(shares: dict[str, float]) -> str:
    colors = ("#0072b2", "#d55e00", "#6b7280")
    spans = "".join(
        f'<span style="flex:{share:.4f} 1 0;background:{color}">{html.escape(name) if share > 0.2 else ""}</span>'
        for (name, share), color in zip(shares.items(), colors, strict=False)
    )
    return f'<div class="lion-shares" aria-hidden="true">{spans}</div>'  # the text before it has the same content


def _map_figure(image: Image.Image, shown: AttentionMap) -> str:
    file = io.BytesIO()
    heat_map(image, shown.patches).save(file, "WEBP", quality=85)
    strongest = shown.patches.max() / shown.patches.mean() if shown.patches.any() else 0.0
    caption = f"{shown.reader}. The brightest patch got {strongest:.1f} times the average."
    return _figure(_data_url(file.getvalue(), "image/webp"), f"Attention of the {shown.reader}", caption)


def _figure(url: str, alt: str, caption: str, kind: str = "") -> str:
    caption = html.escape(caption[0].upper() + caption[1:])
    return (
        f'<figure class="{kind}"><img src="{url}" alt="{html.escape(alt)}"><figcaption>{caption}</figcaption></figure>'
    )


def _data_url(content: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
