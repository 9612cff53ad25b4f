"""A picture and a wish in, an answer and what was used for it out. It knows nothing of any page."""

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from lion_fast.demo.insight import Insight, look_inside
from lion_fast.inference.pipeline import LionPipeline, generate_texts
from lion_fast.io.boxes import parse_boxes
from lion_fast.io.checkpoints import naming
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.tagging.modeling_ram import RamTagger

Want = Literal["caption", "answer", "place"]
WANTS: tuple[Want, ...] = ("caption", "answer", "place")

MAX_TEXT, MAX_TAGS = 500, 2000
"""Characters of a question and of all tags: the whole prompt is read, however long, and its memory grows as its square.
"""

_ASKS_FOR_A_PLACE = re.compile(r"\b(locate|coordinates?|bounding box(es)?|which region)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What the model said of a picture.

    Args:
        text: the answer as it stands.
        boxes: those in the text, [x1, y1, x2, y2] in pixels of the upright picture.
        instruction: what the model was asked.
        task: what the adapters' routers went by.
        seconds: that the answer took, without what came to be known of it afterwards.
        insight: what was used for it.
    """

    text: str
    boxes: list[list[float]]
    instruction: str
    task: str
    seconds: float
    insight: Insight


def instruction_for(want: str, text: str) -> str:
    """The model's instruction for a wish.

    Args:
        want: one of `WANTS`.
        text: a question for an answer, an expression for a place; a caption needs none.

    Raises:
        ValueError: for another wish, or a text that is missing or longer than `MAX_TEXT`.
    """
    if want not in WANTS:
        raise ValueError(f"want: expected one of {', '.join(WANTS)}, got {want!r}")
    if want == "caption":
        return CAPTION_INSTRUCTION
    text = text.strip()
    if not text:
        raise ValueError("Write a question first." if want == "answer" else "Write what to find first.")
    if len(text) > MAX_TEXT:
        raise ValueError(f"The text has {len(text)} characters; at most {MAX_TEXT} are read.")
    return text if want == "answer" else LOCATE_INSTRUCTION.format(expression=text)


def automatic_task(instruction: str) -> str:
    """`region_level` for an instruction that asks for a place or names a box, `image_level` for any other.

    One asks for a place if it speaks of locating, of coordinates, of a bounding box or of "which region", as all
    instructions do that grounding is trained on here; "where is" alone may well want words ("in the kitchen").
    """
    is_of_a_place = _ASKS_FOR_A_PLACE.search(instruction) is not None or parse_boxes(instruction)
    return "region_level" if is_of_a_place else "image_level"


def tidy_tags(tags: str) -> str:
    """Tags from commas or lines between them to LION's `"dog, cart, man"`.

    Raises:
        ValueError: more than `MAX_TAGS` characters.
    """
    if len(tags) > MAX_TAGS:
        raise ValueError(f"The tags have {len(tags)} characters; at most {MAX_TAGS} are read.")
    return ", ".join(filter(None, (tag.strip() for tag in re.split(r"[,\n]", tags))))


class Answerer:
    """A model with its processor and, where its checkpoint has one, its tagger. Calls from threads take turns."""

    def __init__(self, model: LionForCausalLM, processor: LionProcessor, tagger: RamTagger | None = None):
        self.model = model
        self.processor = processor
        self.tagger = tagger
        self._turn = threading.Lock()

    @classmethod
    def from_pretrained(cls, directory: Path, device: torch.device) -> "Answerer":
        """Load a checkpoint's directory, and the tagger in its folder `ram` if it has that.

        Raises:
            CheckpointError: the directory has no processor or no whole model of LION in it, or a broken tagger.
        """
        pipeline = LionPipeline(directory, device=device)
        tagger: Any = None
        if (directory / "ram").is_dir():
            with naming(directory / "ram", "a RAM tagger"):
                tagger = RamTagger.from_pretrained(directory / "ram")
            tagger.to(device).eval()
        return cls(pipeline.model, pipeline.processor, tagger)

    @property
    def takes_tags(self) -> bool:
        return self.processor.soft_prompt_token_id is not None

    def tags_of(self, image: Image.Image) -> str:
        """The tagger's tags, `"dog, cart, man"`; "" without a tagger."""
        if self.tagger is None:
            return ""
        with self._turn:
            return self.tagger([image])[0]

    def answer(self, image: Image.Image, want: str, text: str = "", tags: str = "", task: str | None = None) -> Answer:
        """What the model says.

        Args:
            want, text: see `instruction_for`.
            tags: separated by commas or lines; "" for none.
            task: `"image_level"` or `"region_level"`; None for `automatic_task`.

        Raises:
            ValueError: as `instruction_for` and `tidy_tags`, and for an unknown task.
        """
        instruction = instruction_for(want, text)
        task = automatic_task(instruction) if task is None else task
        made = self.processor(images=image, text=instruction, tags=tidy_tags(tags), task=task, return_tensors="pt")
        with self._turn:
            start = time.perf_counter()
            batch = dict(made.to(self.model.device))
            with torch.no_grad():
                batch["vision_features"] = self.model.get_vision_features(batch.pop("pixel_values"))
            (answer,), ids = generate_texts(self.model, self.processor, batch)
            seconds = time.perf_counter() - start
            insight = look_inside(self.model, batch, ids)
        return Answer(answer, parse_boxes(answer, image.size), instruction, task, seconds, insight)
