"""Boxes: their text format, overlap and drawing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lion_fast.io.boxes import draw_boxes, format_box, iou, parse_boxes

fractions = st.floats(0, 1)
corners = st.tuples(fractions, fractions, fractions, fractions).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
)
# Multiples of 1/8, whose areas are exact in floating point.
grid_corners = corners.map(lambda box: [round(8 * value) / 8 for value in box])


def test_the_papers_example_is_parsed_to_pixels():
    assert parse_boxes("Answer: [0.440,0.060,0.650,0.367]", image_size=(1000, 500)) == [
        pytest.approx([440, 30, 650, 183.5])
    ]


@given(corners, st.integers(1, 5000), st.integers(1, 5000))
def test_parse_inverts_format_to_half_a_thousandth(box, width, height):
    pixels = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
    (parsed,) = parse_boxes(format_box(pixels, (width, height)), (width, height))
    error = np.abs(np.subtract(parsed, pixels)) / (width, height, width, height)
    assert error.max() <= 0.0005 + 1e-9


@pytest.mark.parametrize(
    ("box", "size", "text"),
    [
        ([0.44, 0.06, 0.65, 0.367], (1, 1), "[0.440,0.060,0.650,0.367]"),
        ([10, 20, 100, 50], (100, 50), "[0.100,0.400,1.000,1.000]"),
        ([-3, 0, 120, 50], (100, 50), "[0.000,0.000,1.000,1.000]"),
        (np.array([0, 0, 0, 0]), (9, 9), "[0.000,0.000,0.000,0.000]"),
    ],
)
def test_box_text_has_three_decimals_and_no_spaces(box, size, text):
    assert format_box(box, size) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "[]",
        "[0.1,0.2,0.3]",
        "[0.1,0.2,0.3,0.4,0.5]",
        "[0.1 0.2 0.3 0.4]",
        "[0.1,,0.3,0.4]",
        "[0.1.2,0.2,0.3,0.4]",
        "[., ., ., .]",
        "[0.1,0.2,0.3,0.4",
        "[-0.1,0.2,0.3,0.4]",
        "[1e-1,0.2,0.3,0.4]",
        "[nan,0,1,1]",
        "[__import__('os'),0,1,1]",
        "[12] [0.1,0.2,0.3,0.4]",
    ],
)
def test_a_malformed_answer_has_no_box(text):
    assert parse_boxes(text) == []


@given(st.text(alphabet="[]0123456789., -eox", max_size=40), st.integers(1, 999), st.integers(1, 999))
def test_any_text_gives_ordered_boxes_inside_the_image(text, width, height):
    for x1, y1, x2, y2 in parse_boxes(text, (width, height)):
        assert 0 <= x1 <= x2 <= width
        assert 0 <= y1 <= y2 <= height


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[0.5,0.6,0.1,0.2]", [[0.1, 0.2, 0.5, 0.6]]),
        ("[0.5,0.25,7,1.5]", [[0.5, 0.25, 1, 1]]),
        (f"[0,0,{'9' * 400},1]", [[0, 0, 1, 1]]),
        ("[ 0.1, 0.2 ,0.3,0.4 ]", [[0.1, 0.2, 0.3, 0.4]]),
        ("a dog [0,0,0.5,1] and a cat [0.5,0,1,1].", [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]),
        ("[0,0,0.5,1] and [1] and [0.5,0,1,1]", [[0, 0, 0.5, 1]]),
        ("[a] [0,0,0.5,1]", [[0, 0, 0.5, 1]]),
    ],
    ids=["swapped", "beyond the edge", "overflow", "spaces", "two", "up to the malformed", "other brackets"],
)
def test_boxes_are_sorted_clipped_and_read_up_to_the_first_malformed_one(text, boxes):
    assert parse_boxes(text) == boxes


@given(grid_corners, grid_corners)
def test_iou_equals_the_ratio_of_counted_cells(a, b):
    def cells(box):
        x1, y1, x2, y2 = (int(8 * value) for value in box)
        return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}

    union = cells(a) | cells(b)
    expected = len(cells(a) & cells(b)) / len(union) if union else 0
    assert iou(a, b) == pytest.approx(expected, abs=1e-12)


BLANK = Image.new("RGB", (9, 9))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: iou([0, 0, 1], [0, 0, 1, 1]), ValueError, "a: expected four numbers"),
        (lambda: iou([0, 0, 1, 1], [0, 0, float("nan"), 1]), ValueError, "b: expected four numbers"),
        (lambda: format_box([5, 0, 1, 1]), ValueError, "box: expected four numbers x1 <= x2"),
        (lambda: format_box([0, 0, 1, 1], (0, 5)), ValueError, r"image_size: expected .* got \(0, 5\)"),
        (lambda: parse_boxes("[0,0,1,1]", (5, 5, 3)), ValueError, r"image_size: expected .* got \(5, 5, 3\)"),
        (lambda: parse_boxes("[0,0,1,1]", None), ValueError, "image_size: expected .* got None"),
        (lambda: parse_boxes(["[0,0,1,1]"]), TypeError, "text: expected a string, got list"),
        (lambda: draw_boxes(BLANK, [0, 0, 1, 1]), ValueError, r"boxes\[0\]: expected four numbers .* got 0"),
        (lambda: draw_boxes(BLANK, [[0, 0, 1]]), ValueError, r"boxes\[0\]: expected four numbers"),
        (lambda: draw_boxes(BLANK, [[0, 0, 1, 1]], []), ValueError, r"labels: expected one per box \(1\), got 0"),
        (lambda: draw_boxes(BLANK, [[0, 0, 1, 1]], [3]), TypeError, r"labels\[0\]: expected a string, got int"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("background", ["black", "white", "#d55e00", "#808080"])
def test_an_outline_stands_out_from_any_background_and_does_not_fill_the_box(background):
    image = Image.new("RGB", (120, 90), background)
    drawn = np.asarray(draw_boxes(image, [[20, 10, 100, 80]]), dtype=int)
    difference = np.abs(drawn - np.asarray(image, dtype=int)).max(2)
    band = difference[8:20, 60], difference[70:82, 60], difference[45, 18:30], difference[45, 90:102]
    assert min(side.max() for side in band) > 100
    assert difference[25:65, 35:85].max() == 0
    assert np.asarray(image).std(axis=(0, 1)).max() == 0


def test_boxes_of_one_image_differ_in_colour():
    boxes = [[10 * i, 0, 10 * i + 8, 40] for i in range(7)]
    drawn = draw_boxes(Image.new("RGB", (80, 40)), boxes)
    assert len({drawn.getpixel((10 * i, 20)) for i in range(7)}) == 7


@pytest.mark.parametrize(
    "box", [[0, 0, 0, 0], [-50, -50, 500, 500], [0, 0, 1e308, 1e308], [59, 39, 60, 40], [0, 0, 60, 40]]
)
@pytest.mark.parametrize("label", ["", "dog", "a line of text that is longer than the image is wide", "犬"])
def test_drawing_any_box_and_label_keeps_the_images_size(box, label):
    assert draw_boxes(np.zeros((40, 60), np.uint8), [box], [label]).size == (60, 40)


def test_a_label_is_drawn_above_its_box_or_inside_without_room_above():
    image = Image.new("RGB", (200, 200), "white")
    for top, rows in ((100, slice(80, 98)), (0, slice(3, 20))):
        plain = np.asarray(draw_boxes(image, [[40, top, 160, 180]]), dtype=int)
        labelled = np.asarray(draw_boxes(image, [[40, top, 160, 180]], ["dog"]), dtype=int)
        assert np.abs(labelled - plain)[rows, 45:60].max() > 100


def test_boxes_are_drawn_on_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "sideways.png", exif=exif)
    assert draw_boxes(tmp_path / "sideways.png", [[1, 1, 30, 50]]).size == (40, 60)
