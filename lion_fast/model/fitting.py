"""Comparing a configuration with the names and shapes of its weights, before either takes any memory.

A configuration of a billion layers or words is refused by its own key, in the time that it takes to read the weights'
header. Sizes that no tensor has, such as the number of heads of the vision tower, cannot be compared.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lion_fast.configuration_lion import LionConfig
from lion_fast.io.checkpoints import CheckpointError, TensorInfo


class Size(NamedTuple):
    """A setting of the configuration: its key, its value, and the number that the weights have; None if unknown."""

    key: str
    configured: Any
    found: Any


class Weights:
    """Names and shapes of a checkpoint's tensors."""

    def __init__(self, tensors: Mapping[str, TensorInfo], quantized: bool):
        self.tensors = tensors
        self.quantized = quantized

    def count(self, pattern: str) -> int:
        """Return one more than the largest number that the group of `pattern` matches at the start of a name."""
        matches = map(re.compile(pattern).match, self.tensors)
        # Numbers beyond any configuration's are cut, as Python converts long ones slowly.
        return 1 + max((int(match[1][:12]) for match in matches if match), default=-1)

    def indices(self, pattern: str) -> set[int]:
        matches = map(re.compile(pattern).match, self.tensors)
        return {int(match[1][:12]) for match in matches if match}

    def dim(self, name: str, dim: int, *, saved_as: str | None = None, quantizable: bool = False) -> int | None:
        """Return one dimension of a tensor; None if a quantizer has packed it.

        Args:
            name: name in the model.
            dim: index of the dimension.
            saved_as: other name under which transformers saves the tensor.
            quantizable: whether quantizers replace the tensor.

        Raises:
            CheckpointError: there is no such tensor, or it has fewer dimensions.
        """
        info = self.tensors.get(name) or self.tensors.get(saved_as or name)
        if self.quantized and quantizable and (info is None or not info.dtype.is_floating_point):
            return None
        if info is None:
            prefixed = next((other for other in self.tensors if other.endswith(f".{name}")), None)
            hint = "" if prefixed is None else f", but has {prefixed}: save the model without what wraps it"
            raise CheckpointError(f"lacks the tensor {name}{hint}")
        if not -len(info.shape) <= dim < len(info.shape):
            least = dim + 1 if dim >= 0 else -dim
            raise CheckpointError(f"{name}: expected {least} dimensions or more, got {list(info.shape)}")
        return info.shape[dim]


def expect_fitting(
    config: Any,
    tensors: Mapping[str, TensorInfo],
    folder: Path,
    sizes: Callable[[Any, Weights], Iterator[Size]],
    replaced: Collection[str] = (),
) -> None:
    """Refuse a configuration whose sizes are not those of the weights.

    Args:
        config: configuration of `folder`, with the settings that replace those of its file.
        tensors: names and shapes of the weights, from `scan`.
        folder: named in errors.
        sizes: yields the sizes of this class of configurations.
        replaced: keys that may differ from the weights, because the caller asked for another model.

    Raises:
        CheckpointError: a size differs (the message gives the key and both numbers), a tensor that shows a size is
            missing, or a tensor of a model that is not quantized does not hold floating-point numbers.
    """
    quantized = getattr(config, "quantization_config", None) is not None
    for info in tensors.values():
        if not quantized and not info.dtype.is_floating_point:
            raise CheckpointError(f"{info.file}: {info.name}: expected floating-point numbers, got {info.dtype}")
    try:
        for key, configured, found in sizes(config, Weights(tensors, quantized)):
            if found is not None and configured != found and key not in replaced:
                raise CheckpointError(f"config.json: {key}: expected {found}, as in the weights, got {configured}")
    except CheckpointError as error:
        raise CheckpointError(f"{folder}{'/' if str(error).startswith('config.json') else ': '}{error}") from error


def lion_sizes(config: LionConfig, weights: Weights) -> Iterator[Size]:
    """Yield the sizes of LION that a tensor shows."""
    yield from _vision(config.vision_config, weights)
    has_qformer = "query_tokens" in weights.tensors
    has_aggregator = any(name.startswith("aggregator.") for name in weights.tensors)
    held = {(True, True): "ALL", (True, False): "QFORMER", (False, True): "AGGREGATOR"}.get(
        (has_qformer, has_aggregator)
    )
    if config.visual_input != held:
        yield Size("visual_input", config.visual_input, held or "one of its parts, of which there is none")
    if config.visual_input != "AGGREGATOR":
        yield Size("num_query_tokens", config.num_query_tokens, weights.dim("query_tokens", 1))
        yield from _qformer(config.qformer_config, weights)
    if config.visual_input != "QFORMER":
        aggregator = config.aggregator_config
        blocks = weights.count(r"aggregator\.blocks\.(\d+)\.")
        yield Size("len(aggregator_config.feature_layers)", len(aggregator.feature_layers), blocks + 1)
        if blocks:
            found = weights.dim("aggregator.blocks.0.intermediate.dense.bias", 0)
            yield Size("aggregator_config.intermediate_size", aggregator.intermediate_size, found)
        yield Size(
            "aggregator_config.projection_size",
            aggregator.projection_size,
            weights.dim("aggregator_projection.0.bias", 0),
        )
    text, is_t5 = config.text_config, config.text_config.model_type == "t5"
    yield from (_t5 if is_t5 else _decoder)(text, weights)
    first = "language_model." + ("encoder.block.0.layer.1" if is_t5 else "model.layers.0") + ".adapter.adapters."
    yield Size("num_adapters", config.num_adapters, weights.count(re.escape(first) + r"(\d+)\."))
    yield Size("adapter_rank", config.adapter_rank, weights.dim(first + "0.down_proj.bias", 0))


def _vision(vision: Any, weights: Weights) -> Iterator[Size]:
    patches = "vision_model.patch_embed.proj.weight"
    yield Size("vision_config.hidden_size", vision.hidden_size, weights.dim("vision_model.cls_token", -1))
    yield Size(
        "vision_config.num_hidden_layers", vision.num_hidden_layers, weights.count(r"vision_model\.blocks\.(\d+)\.")
    )
    yield Size("vision_config.num_channels", vision.num_channels, weights.dim(patches, 1))
    yield Size("vision_config.patch_size", vision.patch_size, weights.dim(patches, -1))
    tokens = weights.dim("vision_model.pos_embed", 1)
    side = math.isqrt(max((tokens or 1) - 1, 0))
    yield Size("vision_config.image_size", vision.image_size, side * vision.patch_size)
    yield Size(
        "vision_config.intermediate_size",
        vision.intermediate_size,
        weights.dim("vision_model.blocks.0.mlp.fc1.bias", 0),
    )


def _qformer(qformer: Any, weights: Weights) -> Iterator[Size]:
    layer = r"qformer\.encoder\.layer\.(\d+)\."
    layers = qformer.num_hidden_layers
    yield Size("qformer_config.num_hidden_layers", layers, weights.count(layer))
    yield Size("qformer_config.hidden_size", qformer.hidden_size, weights.dim("query_tokens", -1))
    embeddings = "qformer.embeddings."
    words = weights.dim(embeddings + "word_embeddings.weight", 0)
    yield Size("qformer_config.vocab_size", qformer.vocab_size, words)
    positions = weights.dim(embeddings + "position_embeddings.weight", 0)
    yield Size("qformer_config.max_position_embeddings", qformer.max_position_embeddings, positions)
    inner = weights.dim("qformer.encoder.layer.0.intermediate_query.dense.bias", 0)
    yield Size("qformer_config.intermediate_size", qformer.intermediate_size, inner)
    crossed = weights.indices(layer + "crossattention")
    if crossed != set(range(0, layers, qformer.cross_attention_frequency)):
        found = sorted(crossed)[1] if len(crossed) > 1 else layers
        yield Size("qformer_config.cross_attention_frequency", qformer.cross_attention_frequency, found)


def _t5(text: Any, weights: Weights) -> Iterator[Size]:
    model, block = "language_model.", "language_model.encoder.block.0.layer."
    yield Size("text_config.num_layers", text.num_layers, weights.count(r"language_model\.encoder\.block\.(\d+)\."))
    decoder = weights.count(r"language_model\.decoder\.block\.(\d+)\.")
    yield Size("text_config.num_decoder_layers", text.num_decoder_layers, decoder)
    yield Size("text_config.vocab_size", text.vocab_size, weights.dim(model + "shared.weight", 0))
    yield Size("text_config.d_model", text.d_model, weights.dim(model + "encoder.final_layer_norm.weight", 0))
    bias = block + "0.SelfAttention.relative_attention_bias.weight"
    buckets = weights.dim(bias, 0)
    yield Size("text_config.relative_attention_num_buckets", text.relative_attention_num_buckets, buckets)
    yield Size("text_config.num_heads", text.num_heads, weights.dim(bias, 1))
    width = weights.dim(block + "0.SelfAttention.q.weight", 0, quantizable=True)
    yield Size("text_config.num_heads * d_kv", text.num_heads * text.d_kv, width)
    yield Size("text_config.d_ff", text.d_ff, weights.dim(block + "1.DenseReluDense.wo.weight", 1, quantizable=True))


def _decoder(text: Any, weights: Weights) -> Iterator[Size]:
    model, layer = "language_model.model.", "language_model.model.layers.0."
    layers = weights.count(r"language_model\.model\.layers\.(\d+)\.")
    yield Size("text_config.num_hidden_layers", text.num_hidden_layers, layers)
    yield Size("text_config.vocab_size", text.vocab_size, weights.dim(model + "embed_tokens.weight", 0))
    yield Size("text_config.hidden_size", text.hidden_size, weights.dim(model + "norm.weight", 0))
    inner = weights.dim(layer + "mlp.gate_proj.weight", 0, quantizable=True)
    yield Size("text_config.intermediate_size", text.intermediate_size, inner)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for heads, name in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
        width = weights.dim(f"{layer}self_attn.{name}.weight", 0, quantizable=True)
        yield Size(f"text_config.{heads} * head_dim", getattr(text, heads) * head_dim, width)
