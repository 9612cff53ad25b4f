"""Flan-T5 (Raffel et al., arXiv 1910.10683; Chung et al., 2210.11416) with a mixture of adapters in every
feed-forward layer. Decoding keeps no cache: every step processes the whole sequence.
"""

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .configuration import T5Config
from .gated_gelu import gated_gelu
from .mixture_of_adapters import MixtureOfAdapters
from .multi_scale_attention import multi_scale_attention
from .relative_bias_attention import relative_bias_attention
from .rms_norm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections of self- and cross-attention. A stack's first self-attention holds the bias table of all layers."""

    def __init__(self, config: T5Config, has_bias_table: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        if has_bias_table:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            rearrange(projection, "b l (h d) -> b l h d", h=self.num_heads)
            for projection in (self.q(x), self.k(context), self.v(context))
        )
        return q, k, v

    def dropout_mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        if not self.training:
            return None
        return self.dropout(q.new_ones(len(q), self.num_heads, q.shape[1], k.shape[1]))

    def merge(self, attended: Tensor) -> Tensor:
        return self.o(rearrange(attended, "b l h d -> b l (h d)"))


class SelfAttentionLayer(nn.Module):
    def __init__(self, config: T5Config, is_decoder: bool, has_bias_table: bool) -> None:
        super().__init__()
        self.is_decoder = is_decoder
        self.max_distance = config.max_distance
        self.SelfAttention = Attention(config, has_bias_table)
        self.layer_norm = RMSNorm(config.width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, bias_table: Tensor) -> Tensor:
        normed = self.layer_norm(x)
        q, k, v = self.SelfAttention.project(normed, normed)
        attended = relative_bias_attention(
            q,
            k,
            v,
            bias_table,
            key_padding_mask=mask,
            bidirectional=not self.is_decoder,
            max_distance=self.max_distance,
            causal=self.is_decoder,
            dropout_mask=self.SelfAttention.dropout_mask(q, k),
        )
        return x + self.dropout(self.SelfAttention.merge(attended))


class CrossAttentionLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = RMSNorm(config.width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        q, k, v = self.EncDecAttention.project(self.layer_norm(x), context)
        dropout_mask = self.EncDecAttention.dropout_mask(q, k)
        attended = multi_scale_attention(
            q,
            [k],
            [v],
            scale=1.0,
            key_padding_mask=context_mask,
            dropout_mask=None if dropout_mask is None else [dropout_mask],
        )
        return x + self.dropout(self.EncDecAttention.merge(attended))


class GatedMLP(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(gated_gelu(self.wi_0(x), self.wi_1(x))))


class FeedForwardLayer(nn.Module):
    """The gated MLP reads the normed residual stream; the parallel adapters read the stream itself."""

    def __init__(self, config: T5Config, rank: int, num_adapters: int) -> None:
        super().__init__()
        self.DenseReluDense = GatedMLP(config)
        self.layer_norm = RMSNorm(config.width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.adapter = MixtureOfAdapters(config.width, rank, num_adapters)

    def forward(self, x: Tensor, task_ids: Tensor | None) -> Tensor:
        # The adapters run first, as in the original: the gradients of x are added in the reverse order.
        update = self.adapter(x, task_ids)
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x))) + update


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention to the encoder's output, and a feed-forward layer."""

    def __init__(self, config: T5Config, rank: int, num_adapters: int, is_decoder: bool, has_bias_table: bool) -> None:
        super().__init__()
        self_attention = SelfAttentionLayer(config, is_decoder, has_bias_table)
        cross_attention = [CrossAttentionLayer(config)] if is_decoder else []
        self.layer = nn.ModuleList([self_attention, *cross_attention, FeedForwardLayer(config, rank, num_adapters)])

    def forward(
        self, x: Tensor, mask: Tensor, bias_table: Tensor, task_ids: Tensor | None, *context_and_mask: Tensor
    ) -> Tensor:
        self_attention, *cross_attention, feed_forward = self.layer
        x = self_attention(x, mask, bias_table)
        for layer in cross_attention:
            x = layer(x, *context_and_mask)
        return feed_forward(x, task_ids)


class Stack(nn.Module):
    """The encoder or the decoder, without the embedding."""

    def __init__(self, config: T5Config, rank: int, num_adapters: int, is_decoder: bool) -> None:
        super().__init__()
        depth = config.decoder_depth if is_decoder else config.encoder_depth
        self.block = nn.ModuleList(Block(config, rank, num_adapters, is_decoder, n == 0) for n in range(depth))
        self.final_layer_norm = RMSNorm(config.width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, task_ids: Tensor | None, *context_and_mask: Tensor) -> Tensor:
        bias_table = self.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        x = self.dropout(x)
        for block in self.block:
            x = cast(Tensor, block(x, mask, bias_table, task_ids, *context_and_mask))
        return self.dropout(self.final_layer_norm(x))


class T5(nn.Module):
    def __init__(self, config: T5Config, rank: int, num_adapters: int) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Stack(config, rank, num_adapters, is_decoder=False)
        self.decoder = Stack(config, rank, num_adapters, is_decoder=True)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor, task_ids: Tensor | None) -> Tensor:
        """inputs_embeds [B, L, D], attention_mask [B, L], task_ids [B] -> [B, L, D]."""
        return self.encoder(inputs_embeds, attention_mask, task_ids)

    def decode(
        self,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
        encoder_output: Tensor,
        attention_mask: Tensor,
        task_ids: Tensor | None,
    ) -> Tensor:
        """decoder_input_ids, decoder_attention_mask [B, Lt]; the encoder's output and mask -> logits [B, Lt, vocab]."""
        x = self.shared(decoder_input_ids)
        return self.lm_head(self.decoder(x, decoder_attention_mask, task_ids, encoder_output, attention_mask))
