"""A language stand-in that can read tags.

Flan-T5 can make something of a list of tags in its prompt. The quickstart's language model has never read one, and what
it is told by words after the picture only confuses it: with true tags it names less than without.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims.arms import IMAGE_KINDS, PLAIN_SENTENCE
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import TAG_SENTENCE, LionProcessor
from lion_fast.quickstart.data import SceneSet, encode, pick
from lion_fast.quickstart.loop import Run, train
from lion_fast.quickstart.muon import build_optimizers
from lion_fast.quickstart.standins import Facts, linears, told_loss

_NUM_FACTS = 16  # tokens that a scene is told in, as many as stage 1 shows
_HIDDEN = (0.0, 0.8)  # share of a scene's words that it is not told, drawn per batch, so that tags are worth reading


def telling(processor: LionProcessor, sentence: str) -> LionProcessor:
    """A processor that puts tags into another sentence."""
    processor = copy.copy(processor)
    processor.tag_sentence = sentence
    return processor


def teach_tags(
    model: LionForCausalLM,
    processor: LionProcessor,
    scene_set: SceneSet,
    *,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> Run:
    """Go on training the language model on scenes that it is told of, with their true tags in every other batch.

    Some of what a scene shows is not told, and can be made out from the tags alone. They stand in the plain sentence
    and in LION's by turns, the soft prompt's token as any other. New adapters, which add nothing, stay as they are.
    """
    language_model = model.language_model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("language_model.") and ".adapter." not in name)
    facts = Facts(scene_set.scenes, language_model.get_input_embeddings(), processor.tokenizer).requires_grad_(False)
    facts.waves.zero_()  # what image-level instructions ask is told in words
    is_word = facts.is_word
    tags = [", ".join(scene.tags) for scene in scene_set.scenes]

    def losses() -> Iterator[Tensor]:
        while True:
            for sentence in (None, PLAIN_SENTENCE, None, TAG_SENTENCE):
                for kind in IMAGE_KINDS:
                    scenes = rng.integers(len(scene_set), size=batch_size)
                    samples = [pick(scene_set.samples(i, kind), rng) for i in scenes]
                    batch = (
                        encode(processor, samples)
                        if sentence is None
                        else encode(telling(processor, sentence), samples, [tags[i] for i in scenes])
                    )
                    facts.is_word = is_word & (torch.rand(is_word.shape) >= rng.uniform(*_HIDDEN))
                    told = facts.tell(scenes, _NUM_FACTS, rng)
                    yield told_loss(language_model, told, batch)

    matrices = [module.weight for _, module in linears(language_model)]
    optimizers = build_optimizers([model], matrices, muon_lr=0.004, adamw_lr=3e-3)
    return train("tag reader", IMAGE_KINDS, losses(), optimizers, steps)
