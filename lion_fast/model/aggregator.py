"""The vision aggregator (LION, section 3.2) fuses several layers of the vision tower, coarse to fine.

h = block_1(block_0(V_last; V_mid); V_low), where a block is self-attention, cross-attention to one feature map, and a
feed-forward, each followed by bias, dropout, residual and LayerNorm as in BERT. Attention is not masked.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from lion_fast.configuration_lion import LionAggregatorConfig
from lion_fast.model.attention import AttendingModel, attend
from lion_fast.model.checkpointing import with_gradient


class LionAggregatorProjections(nn.Module):
    """Attention with queries from the hidden states, and keys and values from `context`."""

    def __init__(self, config: LionAggregatorConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1))
            for projected in (self.query(hidden_states), self.key(context), self.value(context))
        )
        return attend(self, query, key, value, self.dropout if self.training else 0.0)


class ZeroInitLinear(nn.Linear):
    """A linear layer whose weight starts at zero, so that a new block only normalises its input."""


class LionAggregatorOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config: LionAggregatorConfig, in_features: int):
        super().__init__()
        self.dense = ZeroInitLinear(in_features, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(hidden_states)))


class LionAggregatorAttention(nn.Module):
    def __init__(self, config: LionAggregatorConfig):
        super().__init__()
        self.self = LionAggregatorProjections(config)
        self.output = LionAggregatorOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        return self.output(self.self(hidden_states, context), hidden_states)


class LionAggregatorIntermediate(nn.Module):
    def __init__(self, config: LionAggregatorConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden_states))


class LionAggregatorBlock(GradientCheckpointingLayer):
    def __init__(self, config: LionAggregatorConfig):
        super().__init__()
        self.attention = LionAggregatorAttention(config)
        self.crossattention = LionAggregatorAttention(config)
        self.intermediate = LionAggregatorIntermediate(config)
        self.output = LionAggregatorOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, feature_map: Tensor) -> Tensor:
        hidden_states = self.attention(hidden_states, hidden_states)
        hidden_states = self.crossattention(hidden_states, feature_map)
        return self.output(self.intermediate(hidden_states), hidden_states)


class LionAggregator(AttendingModel):
    """One block per feature map after the first."""

    config: LionAggregatorConfig
    base_model_prefix = "aggregator"
    main_input_name = "feature_maps"
    _no_split_modules: ClassVar[list[str]] = ["LionAggregatorBlock"]

    def __init__(self, config: LionAggregatorConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList([LionAggregatorBlock(config) for _ in config.feature_layers[1:]])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroInitLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, feature_maps: Tensor) -> Tensor:
        """Fuse the feature maps.

        Args:
            feature_maps: [B, S, N, hidden_size], S = number of `feature_layers`; the first map is the initial hidden
                states.

        Returns:
            [B, N, hidden_size].

        Raises:
            ValueError: S differs from the configuration's.
        """
        if feature_maps.shape[1] != 1 + len(self.blocks):
            raise ValueError(
                f"feature_maps: expected [B, {1 + len(self.blocks)}, N, {self.config.hidden_size}], "
                f"got {list(feature_maps.shape)}"
            )
        hidden_states = with_gradient(feature_maps[:, 0], self.blocks)
        for block, feature_map in zip(self.blocks, feature_maps[:, 1:].unbind(1), strict=True):
            hidden_states = block(hidden_states, feature_map)
        return hidden_states
