"""Insight into an answer: the attention of the model's parts, and the routers' gates of the adapters.

Attention weights are computed from the outputs of the query and key projections, so they are available for every
implementation of attention, including the kernels.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lion_fast.configuration_lion import TASKS
from lion_fast.model.adapters import MixtureOfAdapters
from lion_fast.modeling_lion import LionForCausalLM


@dataclass(frozen=True)
class AttentionMap:
    """Attention to each patch of the image, averaged over heads, queries and layers.

    Args:
        reader: description of the queries and keys.
        patches: [grid, grid], rows from top to bottom; patches and `class_token` sum to 1.
        class_token: attention to the class token.
    """

    reader: str
    patches: np.ndarray
    class_token: float


@dataclass(frozen=True)
class Insight:
    """Attention behind one answer.

    Args:
        shares: attention of the answer's tokens to each part of the language model's input, averaged over layers and
            heads; the shares sum to 1. Empty for a decoder-only language model.
        maps: attention to the image.
    """

    shares: dict[str, float]
    maps: tuple[AttentionMap, ...]


@dataclass(frozen=True)
class Gates:
    """Factors on each adapter's output: router times learned scale (LION, section 3.3).

    Args:
        layers: names of the layers, in execution order.
        adapters: names of the adapters.
        mean, low, high: [layers, tasks, adapters], mean, 10th and 90th percentile over the channels. Tasks are in the
            order of `TASKS`.
    """

    layers: tuple[str, ...]
    adapters: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class _Attention(NamedTuple):
    query: nn.Module
    key: nn.Module
    num_heads: int
    scaled: bool = True


@torch.no_grad()
def look_inside(model: LionForCausalLM, batch: dict[str, Tensor], answer_ids: Tensor) -> Insight:
    """Run the model again on its own answer and return its attention.

    The function registers hooks on the model while it runs, so only one call is allowed at a time.

    Args:
        batch: inputs of `model.generate` for one sample, with `vision_features` instead of `pixel_values`.
        answer_ids: int64 [1, La], output of `generate`.
    """
    aggregator, qformer, decoder = _aggregator_attention(model), _qformer_attention(model), _decoder_attention(model)
    readers = [*aggregator.values(), *qformer, *decoder]
    with _outputs_of([module for reader in readers for module in (reader.query, reader.key)]) as outputs:
        if decoder:
            model(**batch, decoder_input_ids=answer_ids[:, :-1], use_cache=False)  # the last token is not an input
        else:
            image_features = model.encode_images(vision_features=batch["vision_features"])
            question = ("qformer_input_ids", "qformer_attention_mask")
            model.get_visual_prefix(image_features, **{name: batch[name] for name in question if name in batch})
    shares, maps = {}, []
    if decoder:
        read = _mean_weights(decoder, outputs)
        num_queries = model.config.num_query_tokens if qformer else 0
        num_aggregated = batch["vision_features"].shape[2] if aggregator else 0
        parts = {"Q-Former's tokens": num_queries, "aggregator's tokens": num_aggregated}
        parts["text"] = len(read) - sum(parts.values())
        split = np.split(read, np.cumsum(list(parts.values()))[:-1])
        shares = {name: float(part.sum()) for (name, size), part in zip(parts.items(), split, strict=True) if size}
        if aggregator:
            maps.append(_on_patches("answer, to the aggregator's tokens", split[1] / split[1].sum()))
    last = model.config.feature_layers[0]
    if qformer:
        maps.append(_on_patches(f"Q-Former, to vision layer {last}", _mean_weights(qformer, outputs)))
    maps += [
        _on_patches(f"aggregator, to vision layer {layer}", _mean_weights([reader], outputs))
        for layer, reader in aggregator.items()
    ]
    return Insight(shares, tuple(maps))


def adapter_gates(model: LionForCausalLM) -> Gates:
    """Return the gates of every layer with adapters. Without a router, an adapter's gate is its scale for all tasks."""
    layers, values = [], []
    for name, module in model.language_model.named_modules():
        if not isinstance(module, MixtureOfAdapters):
            continue
        gate = module.gate(torch.cat([adapter()[0] for adapter in module.adapters])).detach().float().cpu()
        if not module.has_router:
            gate = gate.expand(len(TASKS), -1).unsqueeze(-1)
        parts = name.split(".")
        stack = f"{parts[0]} " if parts[0] in ("encoder", "decoder") else ""  # none in a decoder-only model
        layers.append(stack + next(part for part in parts if part.isdecimal()))
        values.append(gate.numpy())  # [tasks, adapters, channels]
    gates = np.stack(values)
    low, high = np.percentile(gates, (10, 90), axis=-1)
    count = gates.shape[2]
    adapters = ("region adapter", "image adapter") if count == 2 else tuple(f"adapter {k}" for k in range(count))
    return Gates(tuple(layers), adapters, gates.mean(-1), low, high)


def _aggregator_attention(model: LionForCausalLM) -> dict[int, _Attention]:
    """Return the attention that reads each layer of the vision tower.

    The first layer is the initial hidden states, read by self-attention; each other one is read by a block's
    cross-attention.
    """
    if model.config.visual_input == "QFORMER":
        return {}
    blocks: Any = model.aggregator.blocks
    projections = [blocks[0].attention.self, *(block.crossattention.self for block in blocks)]
    return {
        layer: _Attention(projection.query, projection.key, projection.num_heads)
        for layer, projection in zip(model.config.feature_layers, projections, strict=True)
    }


def _qformer_attention(model: LionForCausalLM) -> list[_Attention]:
    if model.config.visual_input == "AGGREGATOR":
        return []
    qformer: Any = model.qformer
    layers = [layer for layer in qformer.encoder.layer if layer.has_cross_attention]
    attentions = [layer.crossattention.attention for layer in layers]
    return [_Attention(attention.query, attention.key, attention.num_attention_heads) for attention in attentions]


def _decoder_attention(model: LionForCausalLM) -> list[_Attention]:
    """Return the cross-attention of an encoder-decoder, which is T5's: not scaled, without position biases."""
    if not model.config.is_encoder_decoder:
        return []
    attentions = [block.layer[1].EncDecAttention for block in model.language_model.decoder.block]
    return [_Attention(attention.q, attention.k, attention.n_heads, scaled=False) for attention in attentions]


@contextmanager
def _outputs_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        outputs[module] = output

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        yield outputs


def _mean_weights(attentions: Iterable[_Attention], outputs: dict[nn.Module, Tensor]) -> np.ndarray:
    """Return the weights of the keys [Lk], averaged over attentions, heads and queries."""
    means = []
    for attention in attentions:
        query, key = (
            outputs[module].float().unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for module in (attention.query, attention.key)
        )  # [1, H, L, Dh]
        scale = query.shape[-1] ** -0.5 if attention.scaled else 1.0
        means.append((query * scale @ key.transpose(-1, -2)).softmax(-1).mean((0, 1, 2)).cpu())
    return torch.stack(means).mean(0).numpy()


def _on_patches(reader: str, weights: np.ndarray) -> AttentionMap:
    grid = round((len(weights) - 1) ** 0.5)
    return AttentionMap(reader, weights[1:].reshape(grid, grid), float(weights[0]))
