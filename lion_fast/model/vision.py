"""The frozen vision tower: EVA-g's ViT with LION's parameter names and no final norm."""

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from lion_fast.configuration_lion import LionVisionConfig
from lion_fast.model.attention import AttendingModel, attend
from lion_fast.model.checkpointing import with_gradient
from lion_fast.model.validation import expect_floats, expect_integer

MAX_IMAGE_SIZE = 8192
"""Largest side of an image in pixels: memory is allocated for each patch."""


class FusedProjection(nn.Linear):
    """Query, key and value in one product. The caller passes the bias, because keys have none.

    A call like that of any linear layer also works with offloaded weights.
    """

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, self.weight, bias)


class LionVisionAttention(nn.Module):
    def __init__(self, config: LionVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.is_causal = False
        self.qkv = FusedProjection(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # keys have none
        # Quantizers replace the layer, and PEFT wraps it. DoRA and IA3 scale what it computes without a bias, and know
        # of no bias but the layer's own.
        fused = isinstance(self.qkv, FusedProjection)
        qkv = self.qkv(hidden_states, bias) if fused else self.qkv(hidden_states) + bias
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, H, Dh] each
        return self.proj(attend(self, query, key, value))


class LionVisionMLP(nn.Module):
    def __init__(self, config: LionVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class LionVisionBlock(GradientCheckpointingLayer):
    def __init__(self, config: LionVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = LionVisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LionVisionMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class LionPatchEmbedding(nn.Module):
    def __init__(self, config: LionVisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class LionVisionModel(AttendingModel):
    """ViT that returns block outputs, without a norm after the last block."""

    config: LionVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["LionVisionBlock"]

    def __init__(self, config: LionVisionConfig):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.hidden_size))
        self.patch_embed = LionPatchEmbedding(config)
        self.blocks = nn.ModuleList([LionVisionBlock(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LionVisionAttention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, LionVisionModel):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.normal_(module.pos_embed, std=self.config.initializer_range)

    def set_image_size(self, image_size: int) -> None:
        """Change the input size by bicubic interpolation of the patches' position embeddings.

        Args:
            image_size: side of the square input in pixels, a multiple of the patch size.

        Raises:
            ValueError: `image_size` is not a multiple of the patch size, or larger than `MAX_IMAGE_SIZE`.
            TypeError: it is not an integer.
        """
        patch_size = self.config.patch_size
        expect_integer("image_size", image_size, 1, MAX_IMAGE_SIZE)
        if image_size % patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}")
        positions = interpolate_positions(self.pos_embed.detach(), image_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        self.config.image_size = image_size

    def forward(self, pixel_values: Tensor, layers: Iterable[int] | None = None) -> Tensor:
        """Return the outputs of the blocks `layers`, in the order given.

        Args:
            pixel_values: [B, 3, image_size, image_size], normalised.
            layers: 0-based block indices; the last block if None. Blocks after the highest index are not run.

        Returns:
            [B, S, N, hidden_size], S = number of `layers`, N = 1 + number of patches.

        Raises:
            ValueError: the shape of `pixel_values` does not match the configuration, or on a CPU, outside training, a
                value is not finite.
        """
        channels, size = self.config.num_channels, self.config.image_size
        # Training has its own reports of what is not finite (`on_nonfinite`).
        expect_floats("pixel_values", pixel_values, ("B", channels, size, size), finite=not self.training)
        layers = [len(self.blocks) - 1] if layers is None else list(layers)
        patches = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype))
        class_token = self.cls_token.expand(patches.shape[0], -1, -1)
        hidden_states = with_gradient(torch.cat([class_token, patches], dim=1) + self.pos_embed, self.blocks)
        outputs = {}
        for index, block in enumerate(self.blocks[: max(layers) + 1]):
            hidden_states = block(hidden_states)
            if index in layers:
                outputs[index] = hidden_states
        return torch.stack([outputs[index] for index in layers], dim=1)


def interpolate_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Resize position embeddings [1, 1 + g * g, D] to `grid` x `grid` patches, bicubic in float32.

    The class token's embedding is kept.
    """
    class_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old_grid = round(patches.shape[1] ** 0.5)
    square = patches.unflatten(1, (old_grid, old_grid)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([class_token, resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
