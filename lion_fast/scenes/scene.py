"""Small synthetic images with ground truth: coloured shapes and signs, their descriptions and boxes.

A scene depends on `(seed, index)` alone. A data set is therefore defined by its seed: it is infinite, needs no
download, and is the same in every process and in every order of access. Geometry is sampled in units of the image side,
so a scene can be rendered at any `image_size`. A scene has everything that LION learns from: captions, questions,
referring expressions, boxes and tags.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from lion_fast.io.boxes import format_box
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION, REGION_INSTRUCTION
from lion_fast.scenes.drawing import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIGN,
    Figure,
    draw_figure,
    draw_mask,
    draw_sign,
    render,
)

Box = tuple[float, float, float, float]
TaskName = Literal["image_level", "region_level"]

TAGS = tuple(sorted((*COLORS, *SHAPES, SIGN, *BACKGROUNDS)))

# Least horizontal distance of two centres: a caption lists objects from left to right, so the order must be visible.
MIN_CENTER_GAP = 0.10

_LAYOUT_SIZE = 96  # layouts are accepted or rejected at this resolution, whatever the rendered one


@dataclass(frozen=True)
class SceneObject:
    """One object; `box` is the tight box [x1, y1, x2, y2] of its visible pixels, as fractions of width and height."""

    kind: str
    color: str
    size: str | None  # None for signs, which come in one size
    text: str | None  # the word on a sign
    box: Box

    @property
    def description(self) -> str:
        """Full description of the object, such as `large red circle` or `blue sign saying STOP`."""
        if self.kind == SIGN:
            return f"{self.color} sign saying {self.text}"
        return f"{self.size} {self.color} {self.kind}"


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass(frozen=True)
class Expression:
    """A phrase that matches exactly one object of its scene, `objects[target]`."""

    text: str
    target: int


@dataclass(frozen=True)
class Sample:
    """One instruction with its answer; `box` (0..1) is the region that the instruction asks for or mentions."""

    kind: Literal["caption", "vqa", "rec", "reg"]
    task: TaskName
    text: str
    answer: str
    box: Box | None = None


@dataclass(frozen=True)
class Scene:
    """An image with its ground truth. `objects` are ordered from left to right by the centres of their boxes.

    `mask` is uint8 [image_size, image_size]: 0 where the background is visible, k where `objects[k - 1]` is.
    """

    image: Image.Image
    mask: np.ndarray
    objects: tuple[SceneObject, ...]
    background: str
    questions: tuple[Question, ...]

    @property
    def caption(self) -> str:
        phrases = [_with_article(o.description) for o in self.objects]
        listing = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
        return f"{listing} on a {self.background} background"

    @property
    def tags(self) -> tuple[str, ...]:
        """Colours, kinds and background of the scene, in the order of `TAGS`."""
        return tuple(sorted({self.background, *(o.color for o in self.objects), *(o.kind for o in self.objects)}))

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """All unambiguous phrases of the grammar, object by object."""
        return tuple(Expression(text, i) for i in range(len(self.objects)) for text in _expressions(self.objects, i))

    def samples(self) -> list[Sample]:
        """Return all samples of the scene: its caption, questions, expressions and regions."""
        samples = [Sample("caption", "image_level", CAPTION_INSTRUCTION, self.caption)]
        samples += [Sample("vqa", "image_level", q.text, q.answer) for q in self.questions]
        for expression in self.expressions:
            box = self.objects[expression.target].box
            text = LOCATE_INSTRUCTION.format(expression=expression.text)
            samples.append(Sample("rec", "region_level", text, format_box(box), box))
        for o in self.objects:
            text = REGION_INSTRUCTION.format(box=format_box(o.box))
            samples.append(Sample("reg", "region_level", text, _with_article(o.description), o.box))
        return samples


class SceneGenerator:
    """The infinite data set of the scenes of one seed: `generator[index]` for any index >= 0, or iterate.

    `torch.utils.data.Subset(generator, range(n))` is a finite map-style data set.

    Args:
        seed: seed of the data set. Scenes of different seeds are independent.
        image_size: side of the images in pixels. The same (seed, index) shows the same scene at every size.
        num_objects: minimum and maximum number of objects in a scene.
        text_rate: fraction of scenes in which one object is a sign with a word.
        max_overlap: largest hidden fraction of an object's area, 0 (no overlap) to below 1.

    Raises:
        ValueError: an argument is out of range.
        IndexError: the index is negative.
    """

    def __init__(
        self,
        seed: int,
        image_size: int = 96,
        num_objects: tuple[int, int] = (1, 3),
        text_rate: float = 0.25,
        max_overlap: float = 0.25,
    ):
        if image_size < 32:
            raise ValueError(f"image_size: expected at least 32 pixels, got {image_size}")
        if not 1 <= num_objects[0] <= num_objects[1] <= 5:
            raise ValueError(f"num_objects: expected (min, max) with 1 <= min <= max <= 5, got {num_objects}")
        if not 0 <= text_rate <= 1:
            raise ValueError(f"text_rate: expected a fraction in [0, 1], got {text_rate}")
        if not 0 <= max_overlap < 1:
            raise ValueError(f"max_overlap: expected a fraction in [0, 1), got {max_overlap}")
        self.seed = seed
        self.image_size = image_size
        self.num_objects = num_objects
        self.text_rate = text_rate
        self.max_overlap = max_overlap

    def __getitem__(self, index: int) -> Scene:
        if index < 0:
            raise IndexError(f"index: expected 0 or more, got {index}")
        rng = np.random.default_rng([self.seed, index])
        figures = self._draw_layout(rng)
        background = str(rng.choice(BACKGROUNDS))
        image, mask = render(figures, background, self.image_size, np.random.default_rng(rng.integers(2**63)))
        objects = tuple(
            SceneObject(f.kind, f.color, f.size, f.text, _box_of(mask == i + 1)) for i, f in enumerate(figures)
        )
        return Scene(image, mask, objects, background, _questions(objects, background, rng))

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in itertools.count())

    def _draw_layout(self, rng: np.random.Generator) -> list["Figure"]:
        while True:
            count = int(rng.integers(self.num_objects[0], self.num_objects[1] + 1))
            figures = [draw_figure(rng, depth) for depth in range(count)]
            if rng.random() < self.text_rate:
                figures[int(rng.integers(count))] = draw_sign(rng, int(rng.integers(count)))
            for _ in range(20):
                ordered = self._ordered_if_valid(figures)
                if ordered is not None:
                    return ordered
                figures = [f.moved(rng) for f in figures]

    def _ordered_if_valid(self, figures: list["Figure"]) -> list["Figure"] | None:
        """Return the figures from left to right, or None if the image would be ambiguous or too crowded."""
        if len({(f.kind, f.color, f.size) for f in figures}) < len(figures):
            return None
        mask = draw_mask(figures, _LAYOUT_SIZE)
        shown = [mask == i + 1 for i in range(len(figures))]
        whole = [draw_mask([f], _LAYOUT_SIZE) == 1 for f in figures]
        if any(s.sum() < (1 - self.max_overlap) * w.sum() for s, w in zip(shown, whole, strict=True)):
            return None
        for (a, whole_a), (b, whole_b) in itertools.combinations(zip(figures, whole, strict=True), 2):
            if a.color == b.color and (whole_a & whole_b).any():
                return None
        boxes = [_box_of(s) for s in shown]
        order = sorted(range(len(figures)), key=lambda i: _center(boxes[i])[0])
        centers = [_center(boxes[i])[0] for i in order]
        if any(right - left < MIN_CENTER_GAP for left, right in itertools.pairwise(centers)):
            return None
        return [figures[i] for i in order]


def corrupt_tags(
    tags: tuple[str, ...], rng: np.random.Generator, *, drop: float = 0.2, insert: float = 0.2
) -> tuple[str, ...]:
    """Return tags as an imperfect tagger would predict them, in the order of `TAGS`.

    Each true tag is dropped with probability `drop`; for each true tag, a wrong one is added with probability `insert`.
    """
    kept = [tag for tag in tags if rng.random() >= drop]
    absent = [tag for tag in TAGS if tag not in tags]
    wrong = rng.choice(absent, size=min(rng.binomial(len(tags), insert), len(absent)), replace=False)
    return tuple(sorted([*kept, *map(str, wrong)]))


def _box_of(shown: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    height, width = shown.shape
    return (
        float(columns[0] / width),
        float(rows[0] / height),
        float((columns[-1] + 1) / width),
        float((rows[-1] + 1) / height),
    )


def _center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _phrases(objects: tuple[SceneObject, ...], target: int) -> Iterator[tuple[str, list[int]]]:
    """Yield each phrase for an object, with the indices of all objects that match it."""
    o = objects[target]

    def matching(**attributes: str | None) -> list[int]:
        return [i for i, other in enumerate(objects) if all(getattr(other, k) == v for k, v in attributes.items())]

    same_kind = matching(kind=o.kind)
    yield f"the {o.kind}", same_kind
    yield f"the {o.color} object", matching(color=o.color)
    yield f"the {o.color} {o.kind}", matching(color=o.color, kind=o.kind)
    if o.size:
        yield f"the {o.size} {o.kind}", matching(size=o.size, kind=o.kind)
        yield f"the {o.description}", matching(size=o.size, color=o.color, kind=o.kind)
    if o.text:
        yield f"the sign saying {o.text}", matching(text=o.text)
    for position, end in (("leftmost", 0), ("rightmost", -1)):
        if len(objects) > 1:
            yield f"the {position} object", [range(len(objects))[end]]
        if len(same_kind) > 1:
            yield f"the {position} {o.kind}", [same_kind[end]]


def _expressions(objects: tuple[SceneObject, ...], target: int) -> list[str]:
    return [text for text, matches in _phrases(objects, target) if matches == [target]]


def _questions(objects: tuple[SceneObject, ...], background: str, rng: np.random.Generator) -> tuple[Question, ...]:
    questions = [
        Question("How many objects are there?", str(len(objects))),
        Question("What is the background like?", background),
    ]
    for i, o in enumerate(objects):
        names = _expressions(objects, i)
        if f"the {o.kind}" in names:
            questions.append(Question(f"What color is the {o.kind}?", o.color))
        if f"the {o.color} object" in names:
            questions.append(Question(f"What shape is the {o.color} object?", o.kind))
        if o.size and f"the {o.color} {o.kind}" in names:
            questions.append(Question(f"How large is the {o.color} {o.kind}?", o.size))
        if o.text:
            questions.append(Question("What does the sign say?", o.text))
    present = {(o.color, o.kind) for o in objects}
    shown = objects[int(rng.integers(len(objects)))]
    # The wrong pair shares its colour or its kind with an object of the scene, so that neither alone decides.
    decoys = [(shown.color, kind) for kind in (*SHAPES, SIGN)] + [(color, shown.kind) for color in COLORS]
    decoys = [decoy for decoy in decoys if decoy not in present]
    for (color, kind), answer in (
        ((shown.color, shown.kind), "yes"),
        (decoys[int(rng.integers(len(decoys)))], "no"),
    ):
        questions.append(Question(f"Is there {_with_article(f'{color} {kind}')} in the image?", answer))
    if len(objects) > 1:
        a, b = (int(i) for i in rng.choice(len(objects), 2, replace=False))
        first, second = objects[a].description, objects[b].description
        questions.append(Question(f"Is the {first} to the left of the {second}?", "yes" if a < b else "no"))
    return tuple(questions)
