"""Scenes are reproducible, and every statement about an image is true of its pixels."""

import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Subset

from lion_fast.io.boxes import parse_boxes
from lion_fast.scenes import (
    BACKGROUNDS,
    COLORS,
    MIN_CENTER_GAP,
    SHAPES,
    SIGN,
    TAGS,
    WORDS,
    Scene,
    SceneGenerator,
    SceneObject,
    corrupt_tags,
)
from tests.lion_fast.processes import run_python

NUM_SCENES = 60


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(Subset(SceneGenerator(seed=11), range(NUM_SCENES)))


def fingerprint(generator: SceneGenerator, indices: list[int]) -> str:
    digest = hashlib.sha256()
    for scene in (generator[index] for index in sorted(indices)):
        digest.update(scene.image.tobytes())
        digest.update(scene.mask.tobytes())
        digest.update(repr((scene.objects, scene.samples(), scene.tags)).encode())
    return digest.hexdigest()


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    here = fingerprint(SceneGenerator(seed=3), [0, 5, 9])
    generator = SceneGenerator(seed=3)
    for index in (9, 2, 5):
        generator[index]
    assert fingerprint(generator, [9, 0, 5]) == here
    code = (
        "from lion_fast.scenes import SceneGenerator\nfrom tests.lion_fast.scenes.test_scenes import fingerprint\n"
        "print(fingerprint(SceneGenerator(seed=3), [5, 9, 0]))"
    )
    assert run_python("-c", code).strip() == here
    assert fingerprint(SceneGenerator(seed=4), [0, 5, 9]) != here


def test_iteration_starts_at_index_zero() -> None:
    generator = SceneGenerator(seed=3, image_size=32)
    for index, scene in enumerate(itertools.islice(generator, 4)):
        assert scene.image.tobytes() == generator[index].image.tobytes()


def test_image_size_changes_only_the_rendering() -> None:
    for index in range(20):
        small, large = (SceneGenerator(seed=5, image_size=size)[index] for size in (96, 288))
        assert (small.image.size, large.image.size) == ((96, 96), (288, 288))
        assert (small.caption, small.questions, small.tags) == (large.caption, large.questions, large.tags)
        for a, b in zip(small.objects, large.objects, strict=True):
            # A pixel counts if its centre is covered, so an edge moves by less than a pixel of the coarser grid, plus
            # one if another object's edge hides it.
            assert np.abs(np.subtract(a.box, b.box)).max() <= 2 / 96


def test_boxes_are_the_tight_extents_of_the_visible_pixels(scenes: list[Scene]) -> None:
    for scene in scenes:
        height, width = scene.mask.shape
        assert set(np.unique(scene.mask)) <= set(range(len(scene.objects) + 1))
        for number, o in enumerate(scene.objects, 1):
            left, top, right, bottom = (round(v * s) for v, s in zip(o.box, (width, height) * 2, strict=True))
            shown = scene.mask == number
            inside = shown[top:bottom, left:right]
            assert inside.sum() == shown.sum() > 0
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_masked_pixels_have_the_objects_color(scenes: list[Scene]) -> None:
    names = list(COLORS)
    palette = np.array([COLORS[name] for name in names])
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=int)
        for number, o in enumerate(scene.objects, 1):
            typical = np.median(pixels[scene.mask == number], axis=0)
            assert names[int(np.abs(palette - typical).sum(1).argmin())] == o.color


def test_the_caption_names_every_object_from_left_to_right(scenes: list[Scene]) -> None:
    for scene in scenes:
        centers = [(o.box[0] + o.box[2]) / 2 for o in scene.objects]
        # Layouts are accepted at another resolution: each centre may be off by a pixel at both resolutions.
        assert all(b - a >= MIN_CENTER_GAP - 2 / 96 for a, b in itertools.pairwise(centers))
        positions = [scene.caption.index(o.description) for o in scene.objects]
        assert positions == sorted(positions)
        assert scene.caption.endswith(f"on a {scene.background} background")
    assert len({scene.caption for scene in scenes}) > 0.9 * len(scenes)


def test_caption_grammar() -> None:
    box = (0.0, 0.0, 0.5, 0.5)
    circle = SceneObject("circle", "red", "large", None, box)
    sign = SceneObject(SIGN, "orange", None, "STOP", box)
    blank = Image.new("RGB", (32, 32)), np.zeros((32, 32), np.uint8)
    one, two, three = (
        Scene(*blank, objects, "plain", ()).caption for objects in ((sign,), (sign, circle), (circle, sign, circle))
    )
    assert one == "an orange sign saying STOP on a plain background"
    assert two == "an orange sign saying STOP and a large red circle on a plain background"
    assert three.startswith("a large red circle, an orange sign saying STOP and a large red circle on")


def matches(expression: str, o: SceneObject, others: list[SceneObject]) -> bool:
    """Interpret an expression word by word, independently of its generation."""
    words = expression.removeprefix("the ").split()
    if "saying" in words:
        return o.text == words[-1]
    noun, adjectives = words[-1], words[:-1]
    candidates = [other for other in (o, *others) if noun in ("object", other.kind)]
    if o not in candidates:
        return False
    for word in adjectives:
        if word == "leftmost" and any(other.box[0] + other.box[2] < o.box[0] + o.box[2] for other in candidates):
            return False
        if word == "rightmost" and any(other.box[0] + other.box[2] > o.box[0] + o.box[2] for other in candidates):
            return False
        if word not in ("leftmost", "rightmost", o.color, o.size):
            return False
    return True


def test_every_expression_matches_exactly_one_object(scenes: list[Scene]) -> None:
    for scene in scenes:
        named = set()
        for expression in scene.expressions:
            matching = [
                i
                for i, o in enumerate(scene.objects)
                if matches(expression.text, o, [other for other in scene.objects if other is not o])
            ]
            assert matching == [expression.target], (expression, scene.objects)
            named.add(expression.target)
        assert named == set(range(len(scene.objects)))


def test_answers_are_true(scenes: list[Scene]) -> None:
    seen = set()
    for scene in scenes:
        objects, words = scene.objects, [o.text for o in scene.objects if o.text]
        described = {o.description: i for i, o in enumerate(objects)}
        for question in scene.questions:
            text, answer = question.text, question.answer
            seen.add(text.split(" ")[0] + answer)
            if text == "How many objects are there?":
                assert answer == str(len(objects))
            elif text == "What is the background like?":
                assert answer == scene.background
            elif text == "What does the sign say?":
                assert [answer] == words
            elif text.startswith("What color is the "):
                kind = text.removeprefix("What color is the ")[:-1]
                assert [o.color for o in objects if o.kind == kind] == [answer]
            elif text.startswith("What shape is the "):
                color = text.split()[4]
                assert [o.kind for o in objects if o.color == color] == [answer]
            elif text.startswith("How large is the "):
                color, kind = text[:-1].split()[4:]
                assert [o.size for o in objects if (o.color, o.kind) == (color, kind)] == [answer]
            elif text.startswith("Is there a"):
                color, kind = text.split()[3:5]
                assert answer == ("yes" if any((o.color, o.kind) == (color, kind) for o in objects) else "no")
            else:
                first, second = text.removeprefix("Is the ")[:-1].split(" to the left of the ")
                assert answer == ("yes" if described[first] < described[second] else "no")
    assert {"Isyes", "Isno", "Howlarge", "Howsmall"} <= seen


def test_samples_have_lions_instructions(scenes: list[Scene]) -> None:
    for scene in scenes:
        samples = scene.samples()
        assert samples[0].text == "Please describe the image using a single short sentence."
        assert samples[0].answer == scene.caption
        for sample in samples:
            assert (sample.task == "region_level") == (sample.kind in ("rec", "reg")) == (sample.box is not None)
            if sample.kind == "rec":
                assert sample.text.startswith("In the image <image>, can you locate the ")
                assert sample.text.endswith(" and let me know its coordinates?")
                assert sample.box is not None
                assert parse_boxes(sample.answer)[0] == pytest.approx(sample.box, abs=5.001e-4)  # three decimals


def test_tags_are_what_the_image_shows(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert list(scene.tags) == [tag for tag in TAGS if tag in scene.tags]
        assert {tag for tag in scene.tags if tag in COLORS} == {o.color for o in scene.objects}
        assert {tag for tag in scene.tags if tag in (*SHAPES, SIGN)} == {o.kind for o in scene.objects}
        assert [tag for tag in scene.tags if tag in BACKGROUNDS] == [scene.background]


def test_corrupt_tags_has_the_given_rates() -> None:
    rng = np.random.default_rng(0)
    tags, trials = ("blue", "circle", "plain", "red", "star"), 2000
    assert corrupt_tags(tags, rng, drop=0, insert=0) == tags
    assert corrupt_tags(tags, rng, drop=1, insert=0) == ()
    assert len(corrupt_tags(tags, rng, drop=0, insert=1)) == 2 * len(tags)
    noisy = [corrupt_tags(tags, rng, drop=0.3, insert=0.2) for _ in range(trials)]
    dropped = sum(tag not in given for given in noisy for tag in tags) / (trials * len(tags))
    wrong = sum(tag not in tags for given in noisy for tag in given) / (trials * len(tags))
    error = 4 * (0.25 / (trials * len(tags))) ** 0.5  # four standard deviations of a rate
    assert dropped == pytest.approx(0.3, abs=error)
    assert wrong == pytest.approx(0.2, abs=error)
    assert all(list(given) == sorted(set(given)) for given in noisy)


def test_difficulty_follows_the_arguments() -> None:
    crowded = [SceneGenerator(1, 64, num_objects=(4, 4), text_rate=1.0)[i] for i in range(10)]
    assert all(len(s.objects) == 4 and sum(o.kind == SIGN for o in s.objects) == 1 for s in crowded)
    assert {o.text for s in crowded for o in s.objects if o.text} <= set(WORDS)
    apart = [SceneGenerator(1, 96, num_objects=(2, 2), text_rate=0.0, max_overlap=0.0)[i] for i in range(30)]
    assert not any(o.kind == SIGN for s in apart for o in s.objects)
    free, touching = SceneGenerator(2, 96, num_objects=(3, 3), max_overlap=0.25), 0
    for index in range(30):
        scene = free[index]
        boxes = [o.box for o in scene.objects]
        touching += any(
            min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
            for a, b in itertools.combinations(boxes, 2)
        )
    assert touching > 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"image_size": 16}, "image_size"),
        ({"num_objects": (3, 2)}, "num_objects"),
        ({"num_objects": (0, 2)}, "num_objects"),
        ({"text_rate": 1.5}, "text_rate"),
        ({"max_overlap": 1.0}, "max_overlap"),
    ],
)
def test_errors_name_the_argument(arguments: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SceneGenerator(0, **arguments)


def test_negative_indices_are_refused() -> None:
    with pytest.raises(IndexError, match="index"):
        SceneGenerator(0)[-1]
