"""Instructions for each kind of sample, and the choice among them.

The first of each list is the instruction of `model.prompts`; the others paraphrase it, so that the model learns the
task and not the sentence. None of them mentions positions, numbers or writing, because such words would prevent
augmentation (`transforms`). VQA uses the question without an instruction.
"""

import hashlib

from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION, REGION_INSTRUCTION

TEMPLATES = {
    "caption": (
        CAPTION_INSTRUCTION,
        "Describe the image in one short sentence.",
        "What does the image show? Answer with a short sentence.",
        "Give the image a short caption.",
        "In one sentence, what can be seen in this image?",
        "Sum up the image briefly.",
    ),
    "rec": (
        LOCATE_INSTRUCTION,
        "Where is {expression} in the image <image>? Give its coordinates.",
        "In the image <image>, find {expression} and give the bounding box.",
        "Please locate {expression} in the image <image>.",
        "Which region of the image <image> shows {expression}?",
        "I am looking for {expression} in the image <image>. What are the coordinates?",
    ),
    "reg": (
        REGION_INSTRUCTION,
        "In the image <image>, describe the region {box}.",
        "What can be seen within {box} in the image <image>?",
        "Give a short description of what {box} shows in the image <image>.",
        "Describe the object at {box} in the image <image> so that it can be told from the others.",
        "In the image <image>, which object does {box} enclose?",
    ),
}


def instruction(kind: str, key: str, seed: int = 0, **fields: str) -> str:
    """Choose one of `TEMPLATES[kind]` by seed, kind and key alone, and fill in its fields.

    Args:
        kind: `caption`, `rec` (from an expression to the box of its object) or `reg` (from a box to its description).
        key: name of the sample.
        seed: seed of the choice.
        fields: `expression` for `rec`, `box` for `reg`.

    Raises:
        KeyError: unknown kind or missing field.
    """
    digest = hashlib.blake2b(f"{seed}\n{kind}\n{key}".encode(), digest_size=8).digest()
    templates = TEMPLATES[kind]
    return templates[int.from_bytes(digest, "big") % len(templates)].format(**fields)
