"""The Q-Former of InstructBLIP (Dai et al., arXiv 2305.06500): queries read the image, guided by the question."""

import torch
from torch import Tensor, nn

from .bert import Attention, Intermediate, Output
from .configuration import QFormerConfig


class Embeddings(nn.Module):
    """The queries without positions, then the words with positions, with one norm over both."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.num_embeddings, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        words = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(torch.cat([queries, words], dim=1)))


PROJECTIONS = ("key", "value", "query")  # in the order of BLIP-2, not of BERT


class Layer(nn.Module):
    """Joint self-attention, cross-attention of the queries, and separate feed-forward layers for queries and words."""

    def __init__(self, config: QFormerConfig, image_width: int, has_cross_attention: bool) -> None:
        super().__init__()
        width, eps, dropout = config.width, config.layer_norm_eps, config.dropout
        self.has_cross_attention = has_cross_attention
        self.attention = Attention(width, width, config.num_heads, eps, dropout, PROJECTIONS)
        if has_cross_attention:
            self.crossattention = Attention(width, image_width, config.num_heads, eps, dropout, PROJECTIONS)
        self.intermediate = Intermediate(width, config.mlp_width)
        self.output = Output(config.mlp_width, width, eps, dropout)
        self.intermediate_query = Intermediate(width, config.mlp_width)
        self.output_query = Output(config.mlp_width, width, eps, dropout)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor, num_queries: int) -> Tensor:
        x = self.attention(x, x, mask)
        queries, words = x[:, :num_queries], x[:, num_queries:]
        if self.has_cross_attention:
            queries = self.crossattention(queries, image)
        queries = self.output_query(self.intermediate_query(queries), queries)
        words = self.output(self.intermediate(words), words)
        return torch.cat([queries, words], dim=1)


class Encoder(nn.Module):
    def __init__(self, config: QFormerConfig, image_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, image_width, has_cross_attention=n % config.cross_attention_frequency == 0)
            for n in range(config.depth)
        )


class QFormer(nn.Module):
    def __init__(self, config: QFormerConfig, image_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, image_width)

    def forward(self, query_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, image: Tensor) -> Tensor:
        """query_tokens [1, Q, D], input_ids and attention_mask [B, L] (the question), image [B, N, Dv] -> [B, Q, D]."""
        num_queries = query_tokens.shape[1]
        queries = query_tokens.expand(len(input_ids), -1, -1)
        mask = torch.cat([attention_mask.new_ones(queries.shape[:2]), attention_mask], dim=1)
        x = self.embeddings(queries, input_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask, image, num_queries)
        return x[:, :num_queries]
