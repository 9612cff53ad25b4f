"""Answers to the requests of the page, with the insight into each; this module does not depend on the page."""

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from lion_fast.demo.insight import Insight, look_inside
from lion_fast.inference.pipeline import LionPipeline, generate_texts
from lion_fast.io.boxes import parse_boxes
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.tagging.loading import load_tagger
from lion_fast.tagging.modeling_ram import RamTagger

Want = Literal["caption", "answer", "place"]
WANTS: tuple[Want, ...] = ("caption", "answer", "place")

MAX_TEXT, MAX_TAGS = 500, 2000
"""Maximum characters of a question and of all tags: the prompt is never truncated, and its memory grows quadratically.
"""

_ASKS_FOR_A_BOX = re.compile(r"\b(locate|coordinates?|bounding box(es)?|which region)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """The model's answer about an image.

    Args:
        text: text of the answer.
        boxes: boxes in the text, [x1, y1, x2, y2] in pixels of the upright image.
        instruction: instruction that the model was given.
        task: task that selected the adapters' routers.
        seconds: time of the answer, without that of the insight.
        insight: attention behind the answer.
    """

    text: str
    boxes: list[list[float]]
    instruction: str
    task: str
    seconds: float
    insight: Insight


def instruction_for(want: str, text: str) -> str:
    """Return the model's instruction for a request.

    Args:
        want: one of `WANTS`.
        text: the question for "answer", the expression for "place"; not used for "caption".

    Raises:
        ValueError: unknown `want`, or a text that is missing or longer than `MAX_TEXT`.
    """
    if want not in WANTS:
        raise ValueError(f"want: expected one of {', '.join(WANTS)}, got {want!r}")
    if want == "caption":
        return CAPTION_INSTRUCTION
    text = text.strip()
    if not text:
        raise ValueError("Write a question first." if want == "answer" else "Write what to find first.")
    if len(text) > MAX_TEXT:
        raise ValueError(f"The text has {len(text)} characters; at most {MAX_TEXT} are allowed.")
    return text if want == "answer" else LOCATE_INSTRUCTION.format(expression=text)


def automatic_task(instruction: str) -> str:
    """Return `region_level` for an instruction that asks for a box or contains one, and `image_level` otherwise.

    An instruction asks for a box if it contains "locate", "coordinate(s)", "bounding box(es)" or "which region", as all
    grounding instructions of the training data do. "Where is" alone may ask for words ("in the kitchen").
    """
    is_about_a_box = _ASKS_FOR_A_BOX.search(instruction) is not None or parse_boxes(instruction)
    return "region_level" if is_about_a_box else "image_level"


def tidy_tags(tags: str) -> str:
    """Convert tags separated by commas or lines to LION's format, `"dog, cart, man"`.

    Raises:
        ValueError: `tags` has more than `MAX_TAGS` characters.
    """
    if len(tags) > MAX_TAGS:
        raise ValueError(f"The tags have {len(tags)} characters; at most {MAX_TAGS} are allowed.")
    return ", ".join(filter(None, (tag.strip() for tag in re.split(r"[,\n]", tags))))


class Answerer:
    """A model with its processor and, if its checkpoint has one, its tagger. A lock serialises calls from threads."""

    def __init__(self, model: LionForCausalLM, processor: LionProcessor, tagger: RamTagger | None = None):
        self.model = model
        self.processor = processor
        self.tagger = tagger
        self._turn = threading.Lock()

    @classmethod
    def from_pretrained(cls, directory: Path, device: torch.device) -> "Answerer":
        """Load a checkpoint's directory, and the tagger in its subdirectory `ram` if it exists.

        Raises:
            CheckpointError: the directory has no processor or no complete LION model, or its tagger cannot be loaded.
        """
        pipeline = LionPipeline(directory, device=device)
        ram = directory / "ram"
        tagger = load_tagger(ram, device) if ram.is_dir() else None
        return cls(pipeline.model, pipeline.processor, tagger)

    @property
    def takes_tags(self) -> bool:
        return self.processor.soft_prompt_token_id is not None

    def tags_of(self, image: Image.Image) -> str:
        """Return the tagger's tags, `"dog, cart, man"`, or "" without a tagger."""
        if self.tagger is None:
            return ""
        with self._turn:
            return self.tagger([image])[0]

    def answer(self, image: Image.Image, want: str, text: str = "", tags: str = "", task: str | None = None) -> Answer:
        """Answer a request about an image.

        Args:
            want, text: see `instruction_for`.
            tags: tags separated by commas or lines; "" for none.
            task: `"image_level"` or `"region_level"`; None for `automatic_task`.

        Raises:
            ValueError: as for `instruction_for` and `tidy_tags`, or unknown task.
            RuntimeError: the model fails.
        """
        instruction = instruction_for(want, text)
        task = automatic_task(instruction) if task is None else task
        made = self.processor(images=image, text=instruction, tags=tidy_tags(tags), task=task, return_tensors="pt")
        with self._turn:
            try:
                start = time.perf_counter()
                batch = dict(made.to(self.model.device))
                with torch.no_grad():
                    batch["vision_features"] = self.model.get_vision_features(batch.pop("pixel_values"))
                (answer,), ids = generate_texts(self.model, self.processor, batch)
                seconds = time.perf_counter() - start
                insight = look_inside(self.model, batch, ids)
            except ValueError as error:  # not one of the request
                raise RuntimeError(f"the model failed: {error}") from error
        return Answer(answer, parse_boxes(answer, image.size), instruction, task, seconds, insight)
