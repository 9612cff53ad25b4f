"""LION with few blocks in each stack, from which the sizes of the full depth follow.

The blocks of a stack are alike, so each one adds the same parameters and, beyond the first two, saves tensors of the
same sizes: what all blocks share is saved by the first, or by the second with gradient checkpointing. What such blocks
add is therefore measured once, on the third of four, and multiplied.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from lion_fast.configuration_lion import LionConfig
from lion_fast.modeling_lion import LionForCausalLM


@dataclass(frozen=True)
class Stack:
    """A stack of which some blocks are not built.

    Args:
        path: name of its list of blocks in the model.
        period: number of blocks after which they repeat.
        missing: number of periods that are not built.
    """

    path: str
    period: int
    missing: int

    def blocks(self, model: LionForCausalLM) -> list[nn.Module]:
        """Return the built blocks; `repeated` is the part of them that stands for the missing ones, too."""
        blocks: Any = model.get_submodule(self.path)
        return list(blocks)

    @property
    def repeated(self) -> slice:
        return slice(2 * self.period, 3 * self.period)


def shorten(config: LionConfig) -> tuple[LionConfig, list[Stack]]:
    """Return a configuration with four periods of blocks per stack, or fewer, and the stacks that lack blocks.

    A language model with different types of layers keeps all of them.
    """
    config = deepcopy(config)
    stacks = [stack for stack in _shorten_parts(config) if stack.missing]
    last = config.vision_config.num_hidden_layers - 1
    aggregator = config.aggregator_config
    aggregator.feature_layers = [min(layer, last) for layer in aggregator.feature_layers]
    return config, stacks


def _shorten_parts(config: LionConfig) -> Iterator[Stack]:
    yield _shorten("vision_model.blocks", config.vision_config)
    qformer, text = config.qformer_config, config.text_config
    if config.visual_input != "AGGREGATOR":
        yield _shorten("qformer.encoder.layer", qformer, period=qformer.cross_attention_frequency)
    if config.is_encoder_decoder:
        yield _shorten("language_model.encoder.block", text, "num_layers")
        yield _shorten("language_model.decoder.block", text, "num_decoder_layers")
    elif len(types := set(getattr(text, "layer_types", None) or ())) <= 1:
        yield _shorten("language_model.model.layers", text)
        if types:
            text.layer_types = text.layer_types[: text.num_hidden_layers]


def _shorten(path: str, part: Any, name: str = "num_hidden_layers", *, period: int = 1) -> Stack:
    """Reduce the number of blocks of one part in place."""
    depth = getattr(part, name)
    missing = max(0, depth // period - 4)
    setattr(part, name, depth - missing * period)
    return Stack(path, period, missing)
