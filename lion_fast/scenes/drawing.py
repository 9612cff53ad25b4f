"""Drawing of shapes and signs on a background, and the mask of their visible pixels."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "black": (40, 40, 44),
    "blue": (38, 84, 200),
    "green": (36, 148, 72),
    "orange": (242, 134, 20),
    "purple": (136, 56, 176),
    "red": (214, 38, 44),
    "white": (252, 252, 252),
    "yellow": (250, 216, 40),
}
SHAPES = ("circle", "cross", "heart", "square", "star", "triangle")
SIGN = "sign"
WORDS = ("BANK", "CAFE", "EXIT", "OPEN", "STOP", "TAXI")
BACKGROUNDS = ("checked", "dotted", "plain", "striped")

# Sides in units of the image side; the ranges do not overlap, so that "small" and "large" are unambiguous.
SIZES = {"small": (0.28, 0.33), "large": (0.42, 0.50)}
SIGN_SIDE, SIGN_ASPECT = (0.52, 0.60), 0.42

_BACKGROUND_TINTS = ((206, 190, 164), (168, 190, 206), (196, 172, 186), (172, 198, 172), (186, 186, 186))
_SUPERSAMPLING = 3  # odd, so that the mask can take the sample at each pixel's centre


@dataclass(frozen=True)
class Figure:
    kind: str
    color: str
    size: str | None
    text: str | None
    width: float
    height: float
    x: float  # centre
    y: float
    depth: int  # figures of greater depth are drawn over the others

    def moved(self, rng: np.random.Generator) -> "Figure":
        margin_x, margin_y = self.width / 2 + 0.02, self.height / 2 + 0.02
        x, y = float(rng.uniform(margin_x, 1 - margin_x)), float(rng.uniform(margin_y, 1 - margin_y))
        return Figure(self.kind, self.color, self.size, self.text, self.width, self.height, x, y, self.depth)

    def outline(self, scale: float) -> list[tuple[float, float]]:
        points = _UNIT_OUTLINES["square" if self.kind == SIGN else self.kind]
        return [((self.x + px * self.width) * scale, (self.y + py * self.height) * scale) for px, py in points]


def draw_figure(rng: np.random.Generator, depth: int) -> Figure:
    size = str(rng.choice(list(SIZES)))
    side = float(rng.uniform(*SIZES[size]))
    kind, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    return Figure(kind, color, size, None, side, side, 0.0, 0.0, depth).moved(rng)


def draw_sign(rng: np.random.Generator, depth: int) -> Figure:
    width = float(rng.uniform(*SIGN_SIDE))
    color, word = str(rng.choice(list(COLORS))), str(rng.choice(WORDS))
    return Figure(SIGN, color, None, word, width, width * SIGN_ASPECT, 0.0, 0.0, depth).moved(rng)


def _unit_outlines() -> dict[str, list[tuple[float, float]]]:
    """Return polygons whose bounding box is the unit square around the origin."""
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    spikes = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    arm = 0.17
    outlines = {
        "circle": np.stack([np.cos(turn), np.sin(turn)], 1),
        "cross": np.array(
            [
                *((-arm, -0.5), (arm, -0.5), (arm, -arm), (0.5, -arm), (0.5, arm), (arm, arm)),
                *((arm, 0.5), (-arm, 0.5), (-arm, arm), (-0.5, arm), (-0.5, -arm), (-arm, -arm)),
            ]
        ),
        "heart": np.stack(
            [
                16 * np.sin(turn) ** 3,
                -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)),
            ],
            1,
        ),
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
        "star": np.stack([radius * np.cos(spikes), radius * np.sin(spikes)], 1),
        "triangle": np.array([(0, -1), (1, 1), (-1, 1)]),
    }
    fitted = {}
    for kind, points in outlines.items():
        low, high = points.min(0), points.max(0)
        fitted[kind] = [tuple(map(float, p)) for p in (points - (low + high) / 2) / (high - low)]
    return fitted


_UNIT_OUTLINES = _unit_outlines()


def draw_mask(figures: list[Figure], size: int) -> np.ndarray:
    side = size * _SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for number, figure in sorted(enumerate(figures, 1), key=lambda pair: pair[1].depth):
        draw.polygon(figure.outline(side), fill=number)
    return np.asarray(canvas)[_SUPERSAMPLING // 2 :: _SUPERSAMPLING, _SUPERSAMPLING // 2 :: _SUPERSAMPLING].copy()


def render(
    figures: list[Figure], background: str, size: int, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    side = size * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(canvas)
    _paint_background(draw, background, side, rng)
    jitters = [rng.integers(-12, 13, 3) for _ in figures]
    for figure, jitter in sorted(zip(figures, jitters, strict=True), key=lambda pair: pair[0].depth):
        color = np.clip(np.array(COLORS[figure.color]) + jitter, 0, 255)
        edge = tuple(int(c) for c in color * 0.72)
        draw.polygon(figure.outline(side), fill=tuple(map(int, color)), outline=edge, width=max(1, round(side * 0.007)))
        if figure.text:
            ink = (20, 20, 20) if color @ (0.3, 0.6, 0.1) > 140 else (250, 250, 250)
            font_size = round(figure.width * side * 0.31)
            center = (figure.x * side, figure.y * side)
            stroke = max(1, font_size // 24)
            draw.text(
                center, figure.text, fill=ink, font=_font(font_size), anchor="mm", stroke_width=stroke, stroke_fill=ink
            )
    light = 1 + np.add.outer(*(rng.uniform(-0.05, 0.05) * np.linspace(-1, 1, size) for _ in range(2)))
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float64) * light[:, :, None]
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8)), draw_mask(figures, size)


def _paint_background(draw: ImageDraw.ImageDraw, background: str, side: int, rng: np.random.Generator) -> None:
    tint = np.array(_BACKGROUND_TINTS[rng.integers(len(_BACKGROUND_TINTS))]) + rng.integers(-10, 11)
    contrast = rng.uniform(0.84, 0.90) if rng.random() < 0.5 else rng.uniform(1.10, 1.16)
    base, other = tuple(map(int, tint)), tuple(min(255, int(c * contrast)) for c in tint)
    draw.rectangle((0, 0, side, side), fill=base)
    period, slant = rng.uniform(0.13, 0.18) * side, rng.uniform(-1.0, 1.0) * side
    offset_x, offset_y = rng.uniform(0, 1, 2) * period
    grid = np.arange(-1, side / period + 2) * period
    if background == "striped":
        for left in np.arange(-abs(slant), side + abs(slant) + period, period) - offset_x:
            corners = (
                (left, 0),
                (left + period / 2, 0),
                (left + period / 2 + slant, side),
                (left + slant, side),
            )
            draw.polygon(corners, fill=other)
    elif background == "dotted":
        radius = period * 0.28
        for x, y in itertools.product(grid - offset_x, grid - offset_y):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=other)
    elif background == "checked":
        for (i, x), (j, y) in itertools.product(enumerate(grid - offset_x), enumerate(grid - offset_y)):
            if (i + j) % 2:
                draw.rectangle((x, y, x + period, y + period), fill=other)


_font = functools.lru_cache(maxsize=64)(ImageFont.load_default)
