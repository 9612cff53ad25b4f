"""Augmentation: boxes move with their objects, the text of boxes is updated, and words stay true."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lion_fast.data import RandomCrop, RandomHorizontalFlip
from lion_fast.data.templates import TEMPLATES, instruction
from lion_fast.data.transforms import _UNTRUE_WHEN_CROPPED, _UNTRUE_WHEN_FLIPPED
from lion_fast.io.boxes import format_box, parse_boxes

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def image_with_boxes(rng: np.random.Generator) -> tuple[Image.Image, list[list[float]]]:
    """Draw one to three rectangles of different colours in separate columns on black."""
    width, height = (int(v) for v in rng.integers(30, 90, 2))
    pixels = np.zeros((height, width, 3), np.uint8)
    boxes = []
    count = int(rng.integers(1, 4))
    for number in range(count):
        first, last = width * number // count, width * (number + 1) // count
        x1 = int(rng.integers(first, last))
        x2 = int(rng.integers(x1 + 1, last + 1))
        y1 = int(rng.integers(0, height))
        y2 = int(rng.integers(y1 + 1, height + 1))
        pixels[y1:y2, x1:x2] = COLORS[number]
        boxes.append([x1 / width, y1 / height, x2 / width, y2 / height])
    return Image.fromarray(pixels), boxes


def box_of(image: Image.Image, color: tuple[int, int, int]) -> list[float]:
    shown = (np.asarray(image) == color).all(-1)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    width, height = image.size
    return [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]


def region_sample(image: Image.Image, boxes: list[list[float]], **changes: Any) -> dict[str, Any]:
    return {
        "image": image,
        "task": "region_level",
        "question": f"What is at {format_box(boxes[0])}?",
        "answer": "a dog at " + " and ".join(map(format_box, boxes)),
        "tags": None,
        "boxes": boxes,
        "id": None,
        "place": "x:1",
        **changes,
    }


@given(st.integers(0, 2**32), st.sampled_from([(RandomHorizontalFlip(1.0),), (RandomCrop(1.0, 0.3),), None]))
@settings(max_examples=150, deadline=None)
def test_boxes_move_with_the_pixels(seed: int, transforms) -> None:
    rng = np.random.default_rng(seed)
    image, boxes = image_with_boxes(rng)
    sample = region_sample(image, boxes)
    for transform in transforms or (RandomHorizontalFlip(), RandomCrop(), RandomHorizontalFlip()):
        sample = transform(sample, rng)
    for color, box in zip(COLORS, sample["boxes"], strict=False):
        assert box == pytest.approx(box_of(sample["image"], color), abs=1e-9)
    assert len(sample["boxes"]) == len(boxes)
    assert sample["question"] == f"What is at {format_box(sample['boxes'][0])}?"
    assert sample["answer"] == "a dog at " + " and ".join(map(format_box, sample["boxes"]))
    assert np.abs(np.subtract(parse_boxes(sample["answer"]), sample["boxes"])).max() <= 0.0005 + 1e-9


@given(st.integers(0, 2**32), st.floats(0.1, 1))
@settings(max_examples=100, deadline=None)
def test_a_crop_keeps_at_least_the_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    image, boxes = image_with_boxes(rng)
    cropped = RandomCrop(1.0, scale)(region_sample(image, boxes), rng)["image"]
    for side, whole in zip(cropped.size, image.size, strict=True):
        assert scale * whole <= side + 1e-9 <= whole + 1e-9


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_crop_contains_boxes_that_end_between_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = image_with_boxes(rng)[0]
    (x1, x2), (y1, y2) = np.sort(rng.random((2, 2)), axis=1).tolist()
    sample = RandomCrop(1.0, 0.1)(region_sample(image, [[x1, y1, x2, y2]]), rng)
    (box,) = sample["boxes"]
    pixels = np.multiply(np.subtract(box[2:], box[:2]), sample["image"].size)
    assert pixels == pytest.approx(np.multiply([x2 - x1, y2 - y1], image.size), abs=1e-9)


def test_a_crop_and_a_flip_change_the_image() -> None:
    rng = np.random.default_rng(0)
    image, boxes = image_with_boxes(rng)
    sizes = {RandomCrop(1.0)(region_sample(image, [[0.4, 0.4, 0.6, 0.6]]), rng)["image"].size for _ in range(20)}
    assert len(sizes) > 5
    flips = [RandomHorizontalFlip(0.5)(region_sample(image, boxes), rng)["boxes"] != boxes for _ in range(200)]
    assert 70 < sum(flips) < 130


@pytest.mark.parametrize(
    ("words", "flips", "crops"),
    [
        ("the man in red", True, True),
        ("the man on the left", False, False),
        ("LEFTMOST guy", False, False),
        ("lft man", False, False),
        ("2nd from the back", False, False),
        ("guy on r", False, False),
        ("L person", False, False),
        ("a boy's right hand", False, False),
        ("the sign saying STOP", False, True),
        ("a clock", False, True),
        ("number on shirt", False, True),
        ("player 23", False, False),
        ("second car", True, False),
        ("topmost shelf", True, False),
        ("the dog in the middle", True, False),
        ("a brightly lit dog", True, True),
        ("the biggest cleft", True, True),
    ],
)
@pytest.mark.parametrize("field", ["question", "answer"])
def test_samples_whose_words_would_become_wrong_are_not_augmented(
    words: str, flips: bool, crops: bool, field: str
) -> None:
    image, boxes = Image.new("RGB", (40, 40)), [[0.125, 0.25, 0.25, 0.5]]
    for transform, applies in ((RandomHorizontalFlip(1.0), flips), (RandomCrop(1.0, 0.2), crops)):
        sample = region_sample(image, boxes, **{field: words})
        moved = [transform(sample, np.random.default_rng(seed))["boxes"] != boxes for seed in range(20)]
        assert any(moved) == applies


def test_image_level_samples_are_not_augmented() -> None:
    image, boxes = image_with_boxes(np.random.default_rng(1))
    for transform in (RandomHorizontalFlip(1.0), RandomCrop(1.0, 0.2)):
        sample = region_sample(image, boxes, task="image_level")
        assert transform(sample, np.random.default_rng(0)) is sample


@pytest.mark.parametrize("kind", ["rec", "reg"])
def test_no_instruction_prevents_augmentation(kind: str) -> None:
    for template in TEMPLATES[kind]:
        asked = template.format(expression="the dog", box="")
        assert not _UNTRUE_WHEN_FLIPPED.search(asked), template
        assert not _UNTRUE_WHEN_CROPPED.search(asked), template


def test_instructions_depend_on_seed_kind_and_key_alone() -> None:
    keys = [str(i) for i in range(600)]
    chosen = [instruction("rec", key, 3, expression="the dog") for key in keys]
    assert chosen == [instruction("rec", key, 3, expression="the dog") for key in keys]
    assert chosen != [instruction("rec", key, 4, expression="the dog") for key in keys]
    counts = [chosen.count(template.format(expression="the dog")) for template in TEMPLATES["rec"]]
    assert sum(counts) == 600
    assert min(counts) > 60
    assert all("the dog" in text for text in chosen)


def test_settings_out_of_range_are_rejected() -> None:
    with pytest.raises(ValueError, match="p: expected a probability, got 2"):
        RandomHorizontalFlip(2)
    with pytest.raises(ValueError, match="min_scale: expected a share above 0"):
        RandomCrop(min_scale=0)
