"""Augmentation that keeps what is said true: boxes move with the pixels, and the text of boxes with them.

The original crops and flips region-level pictures and leaves the boxes where they were. Here only region-level samples
are touched, as there, and only where their words still hold afterwards: a flip turns left into right and makes writing
unreadable, and a crop moves what is named by its place in the picture.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lion_fast.data.records import BOX_TEXT, Box, rewrite_boxes

# Also as people write who describe objects in haste (RefCOCO): "lft guy", "2nd frm r".
_SIDES = (
    r"left\w*|right\w*|lft|rt|rgt|[lr]|lhs|rhs|(?:counter-?|anti-?)?clockwise|east\w*|west\w*|mirror\w*|profile|"
    r"facing|pointing"
)
_WRITING = (
    r"says?|saying|reads?|reading|text|words?|letters?|numbers?|numbered|digits?|signs?|labels?|labell?ed|logos?|"
    r"written|writing|spell\w*|clocks?|watch|time|o'?clock|license|plates?|jerseys?|titles?|names?|named|brand\w*"
)
_PLACES = (
    r"top\w*|bottom\w*|upper\w*|lower\w*|middle|mid|center\w*|centre\w*|corners?|edges?|borders?|side|far|ends?|"
    r"foreground|background|first|second|third|fourth|fifth|last|next|row|column|half|quadrant"
)
_DIGITS = r"\w*\d\w*"


def _any_of(*words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)


_UNTRUE_WHEN_FLIPPED = _any_of(_SIDES, _WRITING, _DIGITS)
_UNTRUE_WHEN_CROPPED = _any_of(_SIDES, _PLACES, _DIGITS)


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirror region-level samples, left to right.

    Left alone is a sample whose question or answer, but for boxes, speaks of sides, directions, writing or numbers.

    Args:
        p: share of the others that is mirrored.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p: expected a probability, got {self.p}")

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if rng.random() >= self.p or not _may_change(sample, _UNTRUE_WHEN_FLIPPED):
            return sample
        image = sample["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _moved(sample, image, [[1 - x2, y1, 1 - x1, y2] for x1, y1, x2, y2 in sample["boxes"]])


@dataclass(frozen=True)
class RandomCrop:
    """Cut a part out of region-level pictures that holds all their boxes whole.

    Left alone is a sample without boxes, and one whose question or answer, but for boxes, speaks of sides, places in
    the picture, or order.

    Args:
        p: share of the others that is cut.
        min_scale: shortest part of each side that is kept, where the boxes leave room, above 0 to 1. Width and height
            are drawn independently, evenly between the shortest that holds the boxes and the whole.
    """

    p: float = 0.5
    min_scale: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p: expected a probability, got {self.p}")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale: expected a share above 0, at most 1, got {self.min_scale}")

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        boxes = sample["boxes"]
        if rng.random() >= self.p or not boxes or not _may_change(sample, _UNTRUE_WHEN_CROPPED):
            return sample
        width, height = sample["image"].size
        left, right = self._window(min(b[0] for b in boxes), max(b[2] for b in boxes), width, rng)
        top, bottom = self._window(min(b[1] for b in boxes), max(b[3] for b in boxes), height, rng)
        image = sample["image"].crop((left, top, right, bottom))
        moved = [
            [
                *_shares((x1 * width - left) / (right - left), (y1 * height - top) / (bottom - top)),
                *_shares((x2 * width - left) / (right - left), (y2 * height - top) / (bottom - top)),
            ]
            for x1, y1, x2, y2 in boxes
        ]
        return _moved(sample, image, moved)

    def _window(self, low: float, high: float, side: int, rng: np.random.Generator) -> tuple[int, int]:
        """First and last pixel edge of a part of a side that holds low..high, both 0..1."""
        first, last = math.floor(low * side), min(math.ceil(high * side), side)
        shortest = max(last - first, math.ceil(self.min_scale * side))
        length = int(rng.integers(shortest, side + 1))
        start = int(rng.integers(max(0, last - length), min(first, side - length) + 1))
        return start, start + length


def _may_change(sample: dict[str, Any], untrue: re.Pattern[str]) -> bool:
    if sample["task"] != "region_level":
        return False
    return not any(untrue.search(BOX_TEXT.sub("", sample[name])) for name in ("question", "answer"))


def _moved(sample: dict[str, Any], image: Image.Image, boxes: list[list[float]]) -> dict[str, Any]:
    before: list[Box] = [tuple(box) for box in sample["boxes"]]
    after: list[Box] = [tuple(box) for box in boxes]  # type: ignore[misc]
    texts = {name: rewrite_boxes(sample[name], before, after) for name in ("question", "answer")}
    return {**sample, **texts, "image": image, "boxes": boxes}


def _shares(*values: float) -> tuple[float, ...]:
    """Values that rounding may have left a hair outside of 0..1."""
    return tuple(min(max(value, 0.0), 1.0) for value in values)
