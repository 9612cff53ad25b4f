"""Boxes: reading and writing LION's text format, overlap, and drawing.

A box is [x1, y1, x2, y2], its left, top, right and bottom edges, in the units of `image_size = (width, height)`: pixels
if the image's size is given, 0..1 with the default (1, 1). Sizes are those of the upright image (`load_image`).
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from lion_fast.io.images import ImageLike


_BOX_TEXT = re.compile(r"\[([0-9., ]+)\]")

# Okabe and Ito's palette without black, which colour-blind readers can distinguish.
PALETTE = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (240, 228, 66))


def parse_boxes(text: str, image_size: tuple[float, float] = (1, 1)) -> list[list[float]]:
    """Parse the boxes in a model's answer, such as `Answer: [0.440,0.060,0.650,0.367]`.

    Brackets of digits, dots, commas and spaces are read in order, up to the first that does not hold four numbers: an
    answer whose first bracket is malformed has no box. Numbers are clipped to 0..1 and corners are sorted, so that
    x1 <= x2 and y1 <= y2 and the box lies inside the image; it may be empty.

    Args:
        text: the answer.
        image_size: (width, height) of the image; a size in pixels gives boxes in pixels.

    Returns:
        One [x1, y1, x2, y2] per box; [] if there is none.

    Raises:
        TypeError: `text` is not a string (decode answers one at a time).
        ValueError: `image_size` is not two positive numbers.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    width, height = _checked_size(image_size)
    boxes = []
    for match in _BOX_TEXT.finditer(text):
        try:
            numbers = [min(float(number), 1.0) for number in match[1].split(",")]
        except ValueError:
            break
        if len(numbers) != 4:
            break
        (x1, x2), (y1, y2) = sorted(numbers[0::2]), sorted(numbers[1::2])
        boxes.append([x1 * width, y1 * height, x2 * width, y2 * height])
    return boxes


def format_box(box: Sequence[float], image_size: tuple[float, float] = (1, 1)) -> str:
    """Format a box as LION's text: `[x1,y1,x2,y2]` as fractions of width and height, three decimals, no spaces.

    The box is clipped to the image.

    Raises:
        ValueError: `box` is not four finite numbers with x1 <= x2 and y1 <= y2, or `image_size` is not two positive
            numbers.
    """
    width, height = _checked_size(image_size)
    x1, y1, x2, y2 = _checked_box(box, "box")
    fractions = (x1 / width, y1 / height, x2 / width, y2 / height)
    return "[" + ",".join(f"{min(max(fraction, 0.0), 1.0):.3f}" for fraction in fractions) + "]"


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the area of the intersection over that of the union, 0..1; 0 if both boxes are empty.

    Raises:
        ValueError: a box is not four finite numbers with x1 <= x2 and y1 <= y2.
    """
    ax1, ay1, ax2, ay2 = _checked_box(a, "a")
    bx1, by1, bx2, by2 = _checked_box(b, "b")
    intersection = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    return intersection / union if union > 0 else 0.0


def draw_boxes(
    image: "ImageLike", boxes: Sequence[Sequence[float]], labels: Sequence[str] | None = None
) -> Image.Image:
    """Draw boxes on a copy of the image, each in its own colour between dark and light edges.

    Args:
        image: any type that `load_image` reads.
        boxes: [x1, y1, x2, y2] each, in pixels of the upright image.
        labels: one line of text per box, drawn above the box, or inside it if there is no room above.

    Returns:
        RGB image of the same size.

    Raises:
        ValueError: a box is not four finite numbers with x1 <= x2 and y1 <= y2, or the numbers of labels and boxes
            differ.
        TypeError: a label is not a string.
    """
    from lion_fast.io.images import load_image

    image = load_image(image)
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"labels: expected one per box ({len(boxes)}), got {len(labels)}")
    for i, label in enumerate(labels or ()):
        if not isinstance(label, str):
            raise TypeError(f"labels[{i}]: expected a string, got {type(label).__name__}")
    checked = [_checked_box(box, f"boxes[{i}]") for i, box in enumerate(boxes)]
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(boxes))]
    stroke = max(1, round(min(image.size) / 160))
    draw = ImageDraw.Draw(image)
    # Pillow's coordinates overflow far outside the image, where nothing is visible.
    limits = [side + 8 * stroke for side in image.size * 2]
    checked = [tuple(min(max(v, -m), m) for v, m in zip(box, limits, strict=True)) for box in checked]
    for box, color in zip(checked, colors, strict=True):
        _draw_outline(draw, box, color, stroke)
    # Labels are drawn last, so that no box covers the label of an earlier one.
    for box, color, label in zip(checked, colors, labels or (), strict=labels is not None):
        _draw_label(draw, box, color, label, stroke)
    return image


def _draw_outline(draw: ImageDraw.ImageDraw, box: tuple[float, ...], color: tuple[int, int, int], stroke: int) -> None:
    # A dark line outside and a light line inside: one of them stands out from any background.
    edge = max(1, stroke // 2)
    x1, y1, x2, y2 = (round(value) for value in box)
    for inset, width, ink in (
        (-edge, edge, (0, 0, 0)),
        (0, stroke, color),
        (stroke, edge, (255, 255, 255)),
    ):
        if x2 - x1 > 2 * inset and y2 - y1 > 2 * inset:
            draw.rectangle((x1 + inset, y1 + inset, x2 - 1 - inset, y2 - 1 - inset), outline=ink, width=width)


def _draw_label(
    draw: ImageDraw.ImageDraw, box: tuple[float, ...], color: tuple[int, int, int], label: str, stroke: int
) -> None:
    width, height = draw.im.size
    font = ImageFont.load_default(max(10, round(min(width, height) / 28)))
    padding = stroke + 1
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    plate_width, plate_height = right - left + 2 * padding, bottom - top + 2 * padding
    x = max(0, min(round(box[0]), math.floor(width - plate_width)))
    above = round(box[1]) - plate_height
    y = above if above >= 0 else max(0, min(round(box[1]), math.floor(height - plate_height)))
    draw.rectangle((x, y, x + plate_width - 1, y + plate_height - 1), fill=color, outline=(0, 0, 0))
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text(
        (x + padding - left, y + padding - top), label, fill=(0, 0, 0) if luma > 110 else (255, 255, 255), font=font
    )


def _checked_size(image_size: tuple[float, float]) -> tuple[float, float]:
    size = _numbers(image_size, 2)
    if size is None or min(size) <= 0:
        raise ValueError(f"image_size: expected (width, height), both positive, got {image_size}")
    width, height = size
    return width, height


def _checked_box(box: Sequence[float], name: str) -> tuple[float, float, float, float]:
    numbers = _numbers(box, 4)
    if numbers is None or numbers[0] > numbers[2] or numbers[1] > numbers[3]:
        raise ValueError(f"{name}: expected four numbers x1 <= x2, y1 <= y2, got {box}")
    x1, y1, x2, y2 = numbers
    return x1, y1, x2, y2


def _numbers(values: Sequence[float], count: int) -> list[float] | None:
    """Return `values` as `count` finite numbers, or None if they are anything else."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
