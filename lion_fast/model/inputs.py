"""What the inputs of `LionForCausalLM` may be; `validation` has the checks of a single value."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from lion_fast.configuration_lion import LionConfig
from lion_fast.io.reading import shown
from lion_fast.model.image_features import ImageFeatures
from lion_fast.model.padding import IGNORED
from lion_fast.model.validation import expect_floats, expect_ids, expect_integer, expect_mask, expect_shape
from lion_kernels import values_on_host

# Arguments of `forward` that the language model takes: of every family, and of one kind only.
_FLAGS = ("use_cache", "output_hidden_states", "output_attentions")
_ENCODER_DECODER = ("encoder_outputs", "decoder_inputs_embeds", "past_key_values")
_DECODER_ONLY = ("logits_to_keep",)


def expect_images(config: LionConfig, images: Mapping[str, Any]) -> int:
    """Check the one of `pixel_values`, `vision_features` and `image_features` that is given, and return its batch size.

    Raises:
        ValueError: none or several are given, a shape does not match, or there is no image.
    """
    given = {name: value for name, value in images.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"pixel_values: expected either pixel_values, vision_features or image_features, "
            f"got {' and '.join(given) or 'neither'}"
        )
    ((name, value),) = given.items()
    if name == "image_features":
        expect_image_features(config, value)
    elif name == "vision_features":
        expect_vision_features(config, value)
    else:
        vision = config.vision_config
        shape = ("B", vision.num_channels, vision.image_size, vision.image_size)
        expect_floats(name, value, shape, finite=False)  # the vision tower looks at the values
    if len(value) == 0:
        raise ValueError(f"{name}: expected one image or more, got none")
    return len(value)


def expect_vision_features(config: LionConfig, features: Any) -> None:
    expect_floats("vision_features", features, ("B", len(config.feature_layers), "N", config.vision_config.hidden_size))
    if features.shape[2] == 0:
        raise ValueError(f"vision_features: expected one token or more per image, got {list(features.shape)}")


def expect_image_features(config: LionConfig, features: Any) -> None:
    """Raise ValueError unless `features` are those that `encode_images` of a model with this configuration returns."""
    if not isinstance(features, ImageFeatures):
        raise ValueError(f"image_features: expected ImageFeatures from encode_images, got {shown(features)}")
    expected = {
        "qformer_context": None if config.visual_input == "AGGREGATOR" else config.vision_config.hidden_size,
        "aggregated": None if config.visual_input == "QFORMER" else config.text_config.hidden_size,
    }
    for part, width in expected.items():
        value = getattr(features, part)
        if value is None and width is None:
            continue
        if value is None or width is None:
            raise ValueError(
                f"image_features.{part}: expected {'None' if width is None else 'a tensor'} for visual_input="
                f"{config.visual_input!r}, got {shown(value)}"
            )
        expect_floats(f"image_features.{part}", value, (len(features), "N", width))


def expect_text(
    config: LionConfig, batch: int, input_ids: Any, inputs_embeds: Any, attention_mask: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the text of `batch` samples, as ids int64 [B, L] or as embeddings [B, L, D], and its mask as int64."""
    if (input_ids is None) == (inputs_embeds is None):
        if input_ids is None:
            raise ValueError("input_ids: expected int64 [B, L], got None")
        raise ValueError("inputs_embeds: expected either input_ids or inputs_embeds, got both")
    if inputs_embeds is not None:
        expect_floats("inputs_embeds", inputs_embeds, (batch, None, config.text_config.hidden_size))
        text = inputs_embeds
    else:
        text = _ids(config, "input_ids", input_ids, batch, also=config.soft_prompt_token_id)
    if attention_mask is None:
        return text, None
    attention_mask = expect_mask("attention_mask", attention_mask, tuple(text.shape[:2]))
    if not config.is_encoder_decoder and values_on_host(attention_mask) and not attention_mask.any(1).all():
        raise ValueError("attention_mask: expected a token in each row, got a row of padding alone")
    return text, attention_mask


def _ids(config: LionConfig, name: str, ids: Any, batch: int, also: int | None = None) -> Tensor:
    expect_shape(name, ids, (batch, None))
    return expect_ids(name, ids, config.text_config.vocab_size, also=also)


def expect_question(config: LionConfig, batch: int, ids: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Return the Q-Former's question of `batch` images and its mask, as int64."""
    if ids is None:
        raise ValueError("qformer_input_ids: expected the question as int64 [B, Lq], got None")
    expect_shape("qformer_input_ids", ids, (batch, None))
    qformer = config.qformer_config
    if ids.shape[1] > qformer.max_position_embeddings:
        raise ValueError(
            f"qformer_input_ids: expected at most {qformer.max_position_embeddings} tokens "
            f"(qformer_config.max_position_embeddings), got {ids.shape[1]}"
        )
    ids = expect_ids("qformer_input_ids", ids, qformer.vocab_size)
    if mask is None:
        return ids, torch.ones_like(ids)
    return ids, expect_mask("qformer_attention_mask", mask, tuple(ids.shape))


def expect_task_ids(config: LionConfig, task_ids: Any, batch: int, hint: str = "") -> Tensor | None:
    """Return the task of each of `batch` samples as int64; None is allowed without a router, otherwise `hint` helps."""
    if task_ids is None:
        if config.has_router:
            raise ValueError(f"task_ids: expected int64 [B] (0 region_level, 1 image_level), got None{hint}")
        return None
    expect_shape("task_ids", task_ids, (batch,))
    return expect_ids("task_ids", task_ids, config.text_config.num_tasks)


def expect_labels(config: LionConfig, labels: Any, batch: int) -> Tensor:
    expect_shape("labels", labels, (batch, None))
    if labels.shape[1] == 0:
        raise ValueError(f"labels: expected one token or more per answer, got {list(labels.shape)}")
    return expect_ids("labels", labels, config.text_config.vocab_size, also=IGNORED)


def expect_decoder_inputs(
    config: LionConfig, batch: int, labels: Tensor | None, ids: Any, embeds: Any, mask: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Return `decoder_input_ids` and `decoder_attention_mask` as int64, which fit `labels` if given."""
    if ids is not None and embeds is not None:
        raise ValueError("decoder_inputs_embeds: expected either decoder_input_ids or decoder_inputs_embeds, got both")
    length: int | None = None if labels is None else labels.shape[1]
    if ids is not None:
        expect_shape("decoder_input_ids", ids, (batch, length))
        ids = _ids(config, "decoder_input_ids", ids, batch)
        length = ids.shape[1]
    elif embeds is not None:
        expect_floats("decoder_inputs_embeds", embeds, (batch, length, config.text_config.hidden_size))
        length = embeds.shape[1]
    if length == 0:
        raise ValueError("decoder_input_ids: expected one token or more per answer, got none")
    if mask is not None:
        mask = expect_mask("decoder_attention_mask", mask, (batch, length))
    return ids, mask


def expect_encoder_outputs(config: LionConfig, outputs: Any, shape: Sequence[int] | None = None) -> Tensor:
    """Return the hidden states [B, L, text hidden size] of an encoder's outputs, which are a ModelOutput or a tuple."""
    if not config.is_encoder_decoder:
        raise ValueError("encoder_outputs: expected None for a decoder-only language model")
    hidden_states = getattr(outputs, "last_hidden_state", None)
    if hidden_states is None and isinstance(outputs, tuple | list) and outputs:
        hidden_states = outputs[0]
    if not isinstance(hidden_states, Tensor):
        raise ValueError(f"encoder_outputs: expected the output of the model's encoder, got {shown(outputs)}")
    expected = ("B", "L", config.text_config.hidden_size) if shape is None else tuple(shape)
    expect_floats("encoder_outputs.last_hidden_state", hidden_states, expected)
    if 0 in hidden_states.shape:
        raise ValueError(f"encoder_outputs: expected one token or more, got {list(hidden_states.shape)}")
    return hidden_states


def expect_passed_on(config: LionConfig, given: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """Return the arguments of `forward` that the language model gets, without those that are None.

    Raises:
        TypeError: an argument is unknown, or has the wrong type.
        ValueError: an argument has no meaning for this language model, or a value that it does not take.
    """
    given = {name: value for name, value in given.items() if value is not None}
    own, other = _ENCODER_DECODER, _DECODER_ONLY
    if not config.is_encoder_decoder:
        own, other = other, own
    for name, value in given.items():
        if name in other:
            kind = "an encoder-decoder" if config.is_encoder_decoder else "a decoder-only language model"
            raise ValueError(f"{name}: expected None for {kind}, got {shown(value)}")
        if name not in (*_FLAGS, *own):
            raise TypeError(f"{name}: unexpected argument; expected some of {', '.join((*_FLAGS, *own))}")
        if name in _FLAGS and not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {shown(value)}")
        if name == "past_key_values":
            expect_cache(config, value)
    if "logits_to_keep" in given:
        if labels is not None:
            raise ValueError("logits_to_keep: expected None with labels, whose positions the logits are of")
        expect_integer("logits_to_keep", given["logits_to_keep"], 0)
    if given.get("output_attentions"):
        expect_attention_weights(config)
    return given


def expect_cache(config: LionConfig, cache: Any) -> None:
    """Raise unless `past_key_values` is a cache in which this language model keeps its keys and values apart.

    With a single cache for both attentions, T5 reads the answer's keys where the image's should be, and with a
    cross-attention cache of fixed length also the keys that are not set: wrong logits without an error.

    Raises:
        TypeError: `cache` is not a cache of transformers.
        ValueError: it is of another kind of language model.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values: expected a Cache of transformers, got {shown(cache)}")
    if not config.is_encoder_decoder:
        if isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                "past_key_values: expected a cache of a decoder-only language model, got an EncoderDecoderCache"
            )
    elif not isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"past_key_values: expected an EncoderDecoderCache for an encoder-decoder, got {type(cache).__name__}"
        )
    elif cache.cross_attention_cache.is_compileable:
        raise ValueError(
            "past_key_values: expected a cross-attention cache that grows with its input, such as DynamicCache, got "
            f"{type(cache.cross_attention_cache).__name__}"
        )


def expect_attention_weights(config: LionConfig) -> None:
    """Raise ValueError for `output_attentions=True` unless the language model's attention keeps its weights."""
    implementation = config.text_config._attn_implementation
    if implementation != "eager":
        raise ValueError(
            f"output_attentions: expected False with attn_implementation={implementation!r}, which keeps no attention "
            "weights; load the model with attn_implementation='eager'"
        )


def expect_item_count(count: Any) -> None:
    """Raise unless `num_items_in_batch` can divide the summed loss."""
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.is_complex():
            raise ValueError(f"num_items_in_batch: expected one number, got {shown(count)}")
    elif count is not None and expect_integer("num_items_in_batch", count, 1) >= 1 << 63:
        raise ValueError(f"num_items_in_batch: expected less than 2**63, got {shown(count)}")
