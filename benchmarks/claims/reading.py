"""A language stand-in that can read tags.

Flan-T5 can use a list of tags in its prompt. The quickstart's language model has never read one, and words after the
image only confuse it: with true tags it names less than without.
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

_NUM_FACTS = 16  # tokens that describe a scene, as many as in stage 1
_HIDDEN = (0.0, 0.8)  # range of the share of words withheld, drawn per batch, so that tags are useful


def with_tag_sentence(processor: LionProcessor, sentence: str) -> LionProcessor:
    """Return a processor that puts tags into another sentence."""
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
    """Continue to train the language model on scenes described in words, with true tags in every other batch.

    Parts of a scene are withheld from the description and can only be inferred from the tags. The tags alternate
    between the plain sentence and LION's, in which the soft prompt's token is an ordinary one. New adapters, which add
    nothing, are not trained.
    """
    language_model = model.language_model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("language_model.") and ".adapter." not in name)
    facts = Facts(scene_set.scenes, language_model.get_input_embeddings(), processor.tokenizer).requires_grad_(False)
    facts.waves.zero_()  # the words describe what image-level instructions ask
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
                        else encode(with_tag_sentence(processor, sentence), samples, [tags[i] for i in scenes])
                    )
                    facts.is_word = is_word & (torch.rand(is_word.shape) >= rng.uniform(*_HIDDEN))
                    told = facts.tell(scenes, _NUM_FACTS, rng)
                    yield told_loss(language_model, told, batch)

    matrices = [module.weight for _, module in linears(language_model)]
    optimizers = build_optimizers([model], matrices, muon_lr=0.004, adamw_lr=3e-3)
    return train("tag reader", IMAGE_KINDS, losses(), optimizers, steps)
