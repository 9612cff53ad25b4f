"""The frozen image encoder, EVA-CLIP g/14 (Fang et al., arXiv 2211.07636): pre-norm, no final norm."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .configuration import ViTConfig
from .multi_scale_attention import multi_scale_attention

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Self-attention whose packed projection has a bias for queries and values but not for keys."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = rearrange(
            F.linear(x, self.qkv.weight, bias), "b l (three h d) -> three b l h d", three=3, h=self.num_heads
        )
        return self.proj(rearrange(multi_scale_attention(q, [k], [v]), "b l h d -> b l (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return rearrange(self.proj(pixel_values), "b d y x -> b (y x) d")


class ViT(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """pixel_values [B, 3, image_size, image_size] -> output of every block, [B, 1 + patches, D] each.

        Raises ValueError if the image has another size.
        """
        expected = (3, self.image_size, self.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(f"pixel_values: expected {['B', *expected]}, got {list(pixel_values.shape)}")
        patches = self.patch_embed(pixel_values)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        outputs = []
        for block in self.blocks:
            x = cast(Tensor, block(x))
            outputs.append(x)
        return outputs


def resize_pos_embed(pos_embed: Tensor, grid_size: int) -> Tensor:
    """Resize the n x n grid of position embeddings [1, 1 + n^2, D], keeping [CLS] -> [1, 1 + grid_size^2, D]."""
    cls_position, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = rearrange(grid, "one (y x) d -> one d y x", y=math.isqrt(grid.shape[1]))
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat([cls_position, rearrange(grid, "one d y x -> one (y x) d")], dim=1)
