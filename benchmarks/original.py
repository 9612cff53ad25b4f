"""The original's eager form of LION's parts, on the parameters of ours, so that both compute the same.

The operations and their order are those of the published model: attention with a matrix of scores, the tags' embeddings
projected and repeated for every image, adapters one after the other and one task for the whole batch. T5, the Q-Former
and the vision tower are the same modules of transformers and `lion_fast` in both forms, here with eager attention.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast import LionForCausalLM, RamTagger
from lion_fast.model.adapters import MixtureOfAdapters


class OriginalAdapters(nn.Module):
    """residual + (ratio_1 * A_1(x) + ratio_2 * A_2(x)) with the ratios of the batch's single task."""

    def __init__(self, mixture: MixtureOfAdapters):
        super().__init__()
        self.mixture = mixture

    def forward(self, hidden_states: Tensor, residual: Tensor, task_ids: Tensor) -> Tensor:
        task = task_ids[:1]  # indexing without synchronisation
        updates = []
        for number, adapter in enumerate(self.mixture.adapters, 1):
            scale, down_weight, down_bias, up_weight, up_bias = adapter()
            update = F.linear(F.relu(F.linear(hidden_states, down_weight, down_bias)), up_weight, up_bias)
            updates.append(getattr(self.mixture, f"router_ratio{number}")[task] * (scale * update))
        return residual + sum(updates[1:], updates[0])


def original_lion(model: LionForCausalLM) -> LionForCausalLM:
    """Return a copy of `model` with its own parameters, and attention and adapters as in the original."""
    config = copy.deepcopy(model.config)
    config.kernel_backend = "torch"
    with model.device:
        original = LionForCausalLM._from_config(config, attn_implementation="eager").to(model.dtype)
    original.load_state_dict(model.state_dict())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in original.named_parameters():
        parameter.requires_grad_(trained[name])
    use_original_adapters(original)
    return original.train(model.training)


def use_original_adapters(model: LionForCausalLM) -> None:
    """Replace the adapters in place, on the same parameters."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MixtureOfAdapters):
                setattr(module, name, OriginalAdapters(child))


class OriginalRam(nn.Module):
    """RAM from pixels to logits on the parameters of `tagger`, for inference."""

    def __init__(self, tagger: RamTagger):
        super().__init__()
        self.tagger = tagger
        self.swin = tagger.vision_model
        self.stages = nn.ModuleList(
            nn.ModuleList(SwinBlock(layer) for layer in stage.blocks) for stage in self.swin.encoder.layers
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, _ = self.swin.embeddings(pixel_values)
        for blocks, stage in zip(self.stages, self.swin.encoder.layers, strict=True):
            for block in blocks:
                x = block(x)
            if stage.downsample is not None:
                x = stage.downsample(x, blocks[0].size)
        x = self.swin.layernorm(x)
        pooled = self.swin.pooler(x.transpose(1, 2)).flatten(1)
        tokens = self.tagger.image_proj(torch.cat([pooled.unsqueeze(1), x], dim=1))
        return self._tag(tokens)

    def _tag(self, tokens: Tensor) -> Tensor:
        head = self.tagger.tag_head
        tags = F.relu(head.wordvec_proj(head.label_embed)).unsqueeze(0).repeat(len(tokens), 1, 1)
        for layer in head.layers:
            projected = layer.query(tags), layer.key(tokens), layer.value(tokens)
            q, k, v = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in projected)
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            attended = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().flatten(2)
            tags = layer.attention_norm(layer.attention_proj(attended) + tags)
            tags = layer.ffn_norm(layer.down_proj(F.gelu(layer.up_proj(tags))) + tags)
        return head.fc(tags).squeeze(-1)


class SwinBlock(nn.Module):
    """A Swin block with one projection for queries, keys and values, and a stored mask."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.size = layer.input_resolution
        whole = min(self.size) <= layer.window_size
        self.window = min(self.size) if whole else layer.window_size
        self.shift = 0 if whole else int(layer.shift_size)
        attention = layer.attention
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv_weight = torch.cat([projection.weight for projection in projections])
        self.qkv_bias = torch.cat([projection.bias for projection in projections])
        self.mask = layer.get_attn_mask(*self.size, dtype=torch.float32, device="cpu") if self.shift else None

    def forward(self, x: Tensor) -> Tensor:
        batch, _, channels = x.shape
        (height, width), window, shift = self.size, self.window, self.shift
        windows = self.layer.layernorm_before(x).view(batch, height, width, channels)
        if shift:
            windows = windows.roll((-shift, -shift), dims=(1, 2))
        windows = windows.view(batch, height // window, window, width // window, window, channels)
        windows = windows.transpose(2, 3).contiguous().view(-1, window * window, channels)
        attended = self._attend(windows).view(batch, height // window, width // window, window, window, channels)
        attended = attended.transpose(2, 3).contiguous().view(batch, height, width, channels)
        if shift:
            attended = attended.roll((shift, shift), dims=(1, 2))
        x = x + attended.view(batch, height * width, channels)
        return x + self.layer.mlp.fc2(F.gelu(self.layer.mlp.fc1(self.layer.layernorm_after(x))))

    def _attend(self, x: Tensor) -> Tensor:
        attention = self.layer.attention
        windows, tokens, channels = x.shape
        heads = attention.num_attention_heads
        qkv = F.linear(x, self.qkv_weight, self.qkv_bias).view(windows, tokens, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * attention.scaling) @ k.transpose(-2, -1) + attention.relative_position_bias()
        if self.mask is not None:
            by_picture = scores.view(-1, len(self.mask), heads, tokens, tokens) + self.mask.unsqueeze(1)
            scores = by_picture.view(windows, heads, tokens, tokens)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, channels)
        return attention.o_proj(attended)
