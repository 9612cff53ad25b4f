"""Small synthetic images with ground truth: coloured shapes and signs, their descriptions and boxes."""

from lion_fast.model.prompts import REGION_INSTRUCTION
from lion_fast.scenes.drawing import BACKGROUNDS, COLORS, SHAPES, SIGN, SIZES, WORDS
from lion_fast.scenes.scene import (
    MIN_CENTER_GAP,
    TAGS,
    Expression,
    Question,
    Sample,
    Scene,
    SceneGenerator,
    SceneObject,
    corrupt_tags,
)
from lion_fast.scenes.writing import write_scenes

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
    "write_scenes",
]
