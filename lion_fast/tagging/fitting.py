"""The sizes of a tagger that its weights show, to compare with its configuration before either takes memory."""

import math
from collections.abc import Iterator

from lion_fast.model.fitting import Size, Weights
from lion_fast.tagging.configuration_ram import RamConfig


def ram_sizes(config: RamConfig, weights: Weights) -> Iterator[Size]:
    """Yield the sizes of a tagger that a tensor shows."""
    head, vision = "tag_head.", config.vision_config
    stages = weights.count(r"vision_model\.encoder\.layers\.(\d+)\.")
    depths = [
        weights.count(rf"vision_model\.encoder\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(min(stages, 64))
    ]
    yield Size("vision_config.depths", list(vision.depths), depths)
    tables = [_bias_table(stage, weights) for stage in range(len(depths))]
    yield Size("vision_config.num_heads", list(vision.num_heads), [heads for _, heads in tables])
    yield Size("vision_config.window_size", vision.window_size, (math.isqrt(tables[0][0]) + 1) // 2 if tables else 0)
    patches = "vision_model.embeddings.patch_embeddings.projection.weight"
    yield Size("vision_config.embed_dim", vision.embed_dim, weights.dim(patches, 0))
    yield Size("vision_config.num_channels", vision.num_channels, weights.dim(patches, 1))
    yield Size("vision_config.patch_size", vision.patch_size, weights.dim(patches, -1))
    block = "vision_model.encoder.layers.0.blocks.0."
    inner = weights.dim(block + "mlp.fc1.bias", 0, saved_as=block + "intermediate.dense.bias")
    yield Size("vision_config.mlp_ratio * embed_dim", int(vision.mlp_ratio * vision.embed_dim), inner)
    yield Size("num_tags", config.num_tags, weights.dim(head + "label_embed", 0))
    yield Size("label_size", config.label_size, weights.dim(head + "label_embed", 1))
    yield Size("projection_size", config.projection_size, weights.dim("image_proj.bias", 0))
    yield Size("hidden_size", config.hidden_size, weights.dim(head + "wordvec_proj.bias", 0))
    yield Size("num_hidden_layers", config.num_hidden_layers, weights.count(r"tag_head\.layers\.(\d+)\."))
    inner = weights.dim(head + "layers.0.up_proj.bias", 0)
    yield Size("intermediate_size", config.intermediate_size, inner)


def _bias_table(stage: int, weights: Weights) -> tuple[int, int]:
    """Return rows and heads of a stage's relative position table."""
    attention = f"vision_model.encoder.layers.{stage}.blocks.0.attention."
    name = attention + "relative_position_bias.relative_position_bias_table"
    saved_as = attention + "self.relative_position_bias_table"
    rows, heads = (weights.dim(name, dim, saved_as=saved_as) for dim in (0, 1))
    return rows or 0, heads or 0
