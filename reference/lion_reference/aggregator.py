"""LION's vision aggregator (arXiv 2311.11860): the last ViT layer attends to two earlier layers."""

from torch import Tensor, nn

from .bert import Attention, Intermediate, Output
from .configuration import AggregatorConfig


class Block(nn.Module):
    """Self-attention, cross-attention to one feature map, and a feed-forward layer."""

    def __init__(self, config: AggregatorConfig, width: int) -> None:
        super().__init__()
        eps, dropout = config.layer_norm_eps, config.dropout
        self.attention = Attention(width, width, config.num_heads, eps, dropout)
        self.crossattention = Attention(width, width, config.num_heads, eps, dropout)
        self.intermediate = Intermediate(width, config.mlp_width)
        self.output = Output(config.mlp_width, width, eps, dropout)

    def forward(self, x: Tensor, feature_map: Tensor) -> Tensor:
        x = self.attention(x, x)
        x = self.crossattention(x, feature_map)
        return self.output(self.intermediate(x), x)


class Aggregator(nn.Module):
    def __init__(self, config: AggregatorConfig, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, width) for _ in config.layers[1:])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            # The output projections start at zero, so that each block only normalises its input.
            if isinstance(module, Output):
                nn.init.zeros_(module.dense.weight)

    def forward(self, x: Tensor, feature_maps: list[Tensor]) -> Tensor:
        """x [B, N, D], one feature map [B, N, D] per block -> [B, N, D]."""
        for block, feature_map in zip(self.blocks, feature_maps, strict=True):
            x = block(x, feature_map)
        return x
