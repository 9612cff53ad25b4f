"""Small pictures with known truth: coloured shapes and signs, what they show, and where."""

from lion_fast.scenes.drawing import BACKGROUNDS, COLORS, SHAPES, SIGN, SIZES, WORDS
from lion_fast.scenes.scene import (
    MIN_CENTER_GAP,
    REGION_INSTRUCTION,
    TAGS,
    Expression,
    Question,
    Sample,
    Scene,
    SceneGenerator,
    SceneObject,
    corrupt_tags,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "MIN_CENTER_GAP",
    "REGION_INSTRUCTION",
    "SHAPES",
    "SIGN",
    "SIZES",
    "TAGS",
    "WORDS",
    "Expression",
    "Question",
    "Sample",
    "Scene",
    "SceneGenerator",
    "SceneObject",
    "corrupt_tags",
]
