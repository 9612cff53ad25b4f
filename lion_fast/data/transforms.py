"""Augmentation that keeps samples true: boxes and their text move with the pixels.

The original crops and flips region-level images without moving the boxes. Here, too, only region-level samples are
augmented, but boxes move, and samples whose words would become wrong are not augmented: a flip exchanges left and right
and makes writing unreadable, and a crop changes the position of objects in the image.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lion_fast.data.records import BOX_TEXT, Box, rewrite_boxes

# The patterns include abbreviations of RefCOCO's annotators: "lft guy", "2nd frm r".
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
    """Random horizontal flip of region-level samples.

    A sample is not flipped if its question or answer, apart from boxes, mentions sides, directions, writing or numbers.

    Args:
        p: probability of a flip for all other samples.
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
    """Random crop of region-level images that contains all boxes completely.

    A sample is not cropped if it has no boxes, or if its question or answer, apart from boxes, mentions sides,
    positions in the image, or order.

    Args:
        p: probability of a crop for all other samples.
        min_scale: smallest fraction of each side that is kept, in (0, 1]; the boxes may require more. Width and height
            are drawn independently and uniformly between the smallest allowed size and the full size.
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
        """Return the first and last pixel edge of a random part of a side that contains low..high, both 0..1."""
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
    """Clamp values that rounding may have moved slightly outside 0..1."""
    return tuple(min(max(value, 0.0), 1.0) for value in values)
