"""The post-norm layers of BERT (Devlin et al., arXiv 1810.04805), used by the Q-Former and the aggregator."""

import math

import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from .multi_scale_attention import attention_probabilities
from .residual_layer_norm import residual_layer_norm


class Intermediate(nn.Module):
    """First half of the feed-forward layer, with the exact GELU."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Output(nn.Module):
    """Projection, dropout, residual and norm, which end both attention and the feed-forward layer."""

    def __init__(self, width_in: int, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        norm = self.LayerNorm
        return residual_layer_norm(self.dropout(self.dense(x)), residual, norm.weight, norm.bias, norm.eps)


class Attention(nn.Module):
    """Multi-head attention of x to a context (self-attention if they are the same), never causal."""

    def __init__(
        self,
        width: int,
        context_width: int,
        num_heads: int,
        eps: float,
        dropout: float,
        projections: tuple[str, ...] = ("query", "key", "value"),
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        # The order matters for the last bit: gradients are added in the reverse of it.
        self.self = nn.ModuleDict(
            {name: nn.Linear(width if name == "query" else context_width, width) for name in projections}
        )
        self.output = Output(width, width, eps, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x [B, L, D], context [B, M, Dc], key_padding_mask [B, M] or None -> [B, L, D]."""
        heads = {
            name: rearrange(project(x if name == "query" else context), "b l (h d) -> b l h d", h=self.num_heads)
            for name, project in self.self.items()
        }
        q, k, v = heads["query"], heads["key"], heads["value"]
        # BERT divides the scores; `multi_scale_attention` scales the queries as the ViT does, which rounds differently.
        scores = einsum(q, k, "b l h d, b m h d -> b h l m") / math.sqrt(q.shape[-1])
        if key_padding_mask is None:
            probabilities = scores.softmax(-1)
        else:
            probabilities = attention_probabilities(scores, key_padding_mask.bool()[:, None, None, :])
        attended = einsum(self.dropout(probabilities), v, "b h l m, b m h d -> b l h d")
        return self.output(rearrange(attended, "b l h d -> b l (h d)"), x)
