"""A double of the original LION: class names, attributes, arguments and mathematics, without its code.

It is small, has no tokenizers, and computes the same as `lion_reference`, with the same parameter names. Layers that
`apply_lion_kernels` does not change are the reference's own.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lion_reference import bert, qformer, t5, vit
from lion_reference.configuration import AggregatorConfig, LIONConfig, QFormerConfig, T5Config, ViTConfig
from lion_reference.relative_bias_attention import relative_position_bucket

CONFIG = LIONConfig(
    vit=ViTConfig(image_size=28, patch_size=14, width=16, depth=3, num_heads=2, mlp_width=24),
    # Heads of 4, although the kernels support only multiples of 8.
    qformer=QFormerConfig(
        width=16, depth=2, num_heads=4, mlp_width=24, num_queries=4, num_embeddings=64, max_positions=32, dropout=0.0
    ),
    aggregator=AggregatorConfig(layers=(2, 1, 0), num_heads=2, mlp_width=24, projector_width=40, dropout=0.0),
    t5=T5Config(
        width=32, head_dim=8, mlp_width=48, num_heads=4, encoder_depth=2, decoder_depth=2, vocab_size=64, dropout=0.0
    ),
    adapter_rank=8,
    soft_prompt_id=5,
)


class Attention(vit.Attention):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = None
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q * self.scale @ k.mT
        if rel_pos_bias is not None:
            scores = scores + rel_pos_bias
        out = (self.attn_drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))


class Mlp(vit.MLP):
    """By the name under which reports list it."""


class Block(vit.Block):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.attn, self.mlp = Attention(config.width, config.num_heads), Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rel_pos_bias=rel_pos_bias)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(vit.ViT):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.use_checkpoint = False
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        outputs = []
        for block in self.blocks:
            x = checkpoint(block, x, None, use_reentrant=False) if self.use_checkpoint else block(x, None)
            outputs.append(x)
        return outputs


class BertSelfAttention(nn.Module):
    """BLIP-2's always returns keys and values; that of transformers 4 only if `is_decoder`, which BLIP-2's lacks."""

    def __init__(self, config: Any, context_width: int) -> None:
        super().__init__()
        self.num_attention_heads = config.num_heads
        self.attention_head_size = config.width // config.num_heads
        self.key = nn.Linear(context_width, config.width)
        self.value = nn.Linear(context_width, config.width)
        self.query = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.position_embedding_type = "absolute"

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        key, value, query = (
            x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for x in (self.key(context), self.value(context), self.query(hidden_states))
        )
        scores = query @ key.mT / self.attention_head_size**0.5
        mask = encoder_attention_mask if cross else attention_mask
        probabilities = (scores if mask is None else scores + mask).softmax(-1)
        dropped = self.dropout(probabilities)
        out = ((dropped if head_mask is None else dropped * head_mask) @ value).transpose(1, 2).flatten(2)
        return (out, probabilities, (key, value)) if output_attentions else (out, (key, value))


class BertSelfOutput(bert.Output):
    def __init__(self, width_in: int, config: Any) -> None:
        super().__init__(width_in, config.width, config.layer_norm_eps, config.dropout)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertOutput(BertSelfOutput):
    pass


def feed_forward(config: Any) -> tuple[bert.Intermediate, BertOutput]:
    return bert.Intermediate(config.width, config.mlp_width), BertOutput(config.mlp_width, config)


class BertAttention(nn.Module):
    def __init__(self, config: Any, context_width: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, context_width)
        self.output = BertSelfOutput(config.width, config)

    def forward(self, hidden_states, *args):
        outputs = self.self(hidden_states, *args)
        return self.output(outputs[0], hidden_states), *outputs[1:]


class BertLayer(nn.Module):
    """The aggregator's layer, as in transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention, self.crossattention = BertAttention(config, config.width), BertAttention(config, config.width)
        self.attention.self.is_decoder = self.crossattention.self.is_decoder = True
        self.intermediate, self.output = feed_forward(config)

    def forward(self, hidden_states, encoder_hidden_states):
        attended, past = self.attention(hidden_states)
        attended, cross_past = self.crossattention(attended, None, None, encoder_hidden_states)
        return self.output(self.intermediate(attended), attended), (past, cross_past)


class FusionAdapter(nn.Module):
    def __init__(self, config: AggregatorConfig, dim: int) -> None:
        super().__init__()
        settings = SimpleNamespace(**vars(config), width=dim)
        self.blocks = nn.ModuleList(BertLayer(settings) for _ in config.layers[1:])

    def forward(self, hidden_states, encoder_hidden_states):
        for block, feature_map in zip(self.blocks, encoder_hidden_states, strict=True):
            hidden_states = block(hidden_states, encoder_hidden_states=feature_map)[0]
        return hidden_states


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, vision_width: int, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = BertAttention(config, config.width)
        self.has_cross_attention = has_cross_attention
        if has_cross_attention:
            self.crossattention = BertAttention(config, vision_width)
        self.intermediate, self.output = feed_forward(config)
        self.intermediate_query, self.output_query = feed_forward(config)

    def forward(self, hidden_states, attention_mask, image, image_mask, query_length):
        attended = self.attention(hidden_states, attention_mask)[0]
        queries, words = attended[:, :query_length], attended[:, query_length:]
        if self.has_cross_attention:
            queries = self.crossattention(queries, attention_mask, None, image, image_mask)[0]
        queries = self.output_query(self.intermediate_query(queries), queries)
        return torch.cat([queries, self.output(self.intermediate(words), words)], 1)


class BertModel(nn.Module):
    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__()
        self.embeddings = qformer.Embeddings(config)
        layers = (QFormerLayer(config, vision_width, n % 2 == 0) for n in range(config.depth))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, input_ids, attention_mask, query_embeds, image):
        mask = torch.cat([attention_mask.new_ones(query_embeds.shape[:2]), attention_mask], 1)
        masks = [(1.0 - m[:, None, None].float()) * -10000.0 for m in (mask, mask.new_ones(image.shape[:2]))]
        hidden_states = self.embeddings(query_embeds, input_ids)
        for layer in self.encoder["layer"]:
            hidden_states = layer(hidden_states, masks[0], image, masks[1], query_embeds.shape[1])
        return hidden_states


class T5LayerNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.float().square().mean(-1, keepdim=True)
        normed = hidden_states * (variance + self.variance_epsilon).rsqrt()
        return self.weight * (normed if self.weight.dtype == torch.float32 else normed.to(self.weight.dtype))


class T5DenseGatedActDense(t5.GatedMLP):
    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.act: nn.Module = nn.GELU()

    def forward(self, hidden_states):
        return self.wo(self.dropout(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)))


class T5LayerFF(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(config)
        self.layer_norm = T5LayerNorm(config.width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states):
        return hidden_states + self.dropout(self.DenseReluDense(self.layer_norm(hidden_states)))


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, is_decoder: bool, has_relative_attention_bias: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.is_decoder = is_decoder
        self.has_relative_attention_bias = has_relative_attention_bias
        self.relative_attention_num_buckets = config.num_buckets
        self.relative_attention_max_distance = config.max_distance
        self.n_heads, self.dropout = config.num_heads, config.dropout
        self.q, self.k, self.v = (nn.Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.width, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.pruned_heads: set[int] = set()
        self.gradient_checkpointing = False

    def compute_bias(self, length: int) -> Tensor:
        positions = torch.arange(length)
        buckets = relative_position_bucket(
            positions - positions[:, None],
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
            bidirectional=not self.is_decoder,
        )
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_value=None,
        layer_head_mask=None,
        query_length=None,
        use_cache=False,
        output_attentions=False,
    ):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        query = heads(self.q(hidden_states))
        if key_value_states is not None and past_key_value is not None:
            key, value = past_key_value
        else:
            context = hidden_states if key_value_states is None else key_value_states
            key, value = heads(self.k(context)), heads(self.v(context))
            if past_key_value is not None:
                key, value = (torch.cat([p, x], 2) for p, x in zip(past_key_value, (key, value), strict=True))
        if position_bias is None:
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(key.shape[2])[:, :, -query.shape[2] :]
            else:
                position_bias = query.new_zeros(1, self.n_heads, query.shape[2], key.shape[2])
            if mask is not None:
                position_bias = position_bias + mask
        weights = (query @ key.mT + position_bias).float().softmax(-1).type_as(query)
        weights = F.dropout(weights, self.dropout, self.training)
        if layer_head_mask is not None:
            weights = weights * layer_head_mask
        out = self.o((weights @ value).transpose(1, 2).flatten(2))
        present = (key, value) if self.is_decoder and use_cache else None
        return (out, present, position_bias, weights) if output_attentions else (out, present, position_bias)


class T5LayerAttention(nn.Module):
    """The original's T5LayerSelfAttention and T5LayerCrossAttention, by the name of the attention."""

    def __init__(self, name: str, config: T5Config, *args: bool) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, T5Attention(config, *args))
        self.layer_norm = T5LayerNorm(config.width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, **kwargs):
        outputs = self.get_submodule(self.name)(self.layer_norm(hidden_states), **kwargs)
        return hidden_states + self.dropout(outputs[0]), *outputs[1:]


class T5Block(nn.Module):
    def __init__(self, config: T5Config, is_decoder: bool, has_relative_attention_bias: bool) -> None:
        super().__init__()
        self.is_decoder = is_decoder
        self.layer = nn.ModuleList([T5LayerAttention("SelfAttention", config, is_decoder, has_relative_attention_bias)])
        if is_decoder:
            self.layer.append(T5LayerAttention("EncDecAttention", config, True))
        self.layer.append(T5LayerFF(config))

    def forward(
        self, hidden_states, mask, bias, context, context_mask, cross_bias, head_mask, past, use_cache, weights
    ):
        shared = {"layer_head_mask": head_mask, "use_cache": use_cache, "output_attentions": weights}
        hidden_states, present, *rest = self.layer[0](
            hidden_states,
            mask=mask,
            position_bias=bias,
            past_key_value=None if past is None else past[:2],
            **shared,
        )
        if self.is_decoder:
            hidden_states, cross_present, *cross_rest = self.layer[1](
                hidden_states,
                key_value_states=context,
                mask=context_mask,
                position_bias=cross_bias,
                past_key_value=None if past is None else past[2:],
                **shared,
            )
            present, rest = (present + cross_present if present else None), rest[:1] + cross_rest[:1] + rest[1:]
        return self.layer[-1](hidden_states), present, *rest


class T5Stack(nn.Module):
    def __init__(self, config: T5Config, embed_tokens: nn.Embedding, is_decoder: bool) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.is_decoder = is_decoder
        depth = config.decoder_depth if is_decoder else config.encoder_depth
        self.block = nn.ModuleList(T5Block(config, is_decoder, n == 0) for n in range(depth))
        self.final_layer_norm = T5LayerNorm(config.width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False

    def invert_attention_mask(self, mask: Tensor) -> Tensor:
        dtype = self.embed_tokens.weight.dtype
        mask = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min

    def get_extended_attention_mask(self, attention_mask: Tensor, input_shape: tuple[int, int]) -> Tensor:
        if self.is_decoder and attention_mask.dim() == 2:
            length, keys = input_shape[1], attention_mask.shape[1]
            causal = torch.ones(length, keys, dtype=attention_mask.dtype).tril(keys - length)
            attention_mask = causal * attention_mask[:, None]
        return self.invert_attention_mask(attention_mask)

    def forward(
        self,
        inputs_embeds,
        attention_mask,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=False,
        head_mask=None,
        output_attentions=False,
    ):
        mask = self.get_extended_attention_mask(attention_mask, inputs_embeds.shape[:2])
        context_mask = self.invert_attention_mask(encoder_attention_mask) if self.is_decoder else None
        hidden_states, bias, cross_bias, presents, weights = self.dropout(inputs_embeds), None, None, [], []
        for n, block in enumerate(self.block):
            past = None if past_key_values is None else past_key_values[n]
            layer_head_mask = None if head_mask is None else head_mask[n]
            arguments = (
                hidden_states, mask, bias, encoder_hidden_states, context_mask, cross_bias, layer_head_mask, past,
                use_cache, output_attentions,
            )  # fmt: skip
            if self.gradient_checkpointing and self.training:
                outputs = checkpoint(block, *arguments, use_reentrant=False)
            else:
                outputs = block(*arguments)
            hidden_states, present, bias, *rest = outputs
            cross_bias = rest[0] if self.is_decoder else None
            presents.append(present)
            weights.append(rest[-1] if output_attentions else None)
        return self.dropout(self.final_layer_norm(hidden_states)), presents, weights


class T5ForConditionalGeneration(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder, self.decoder = T5Stack(config, self.shared, False), T5Stack(config, self.shared, True)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, inputs_embeds, attention_mask, decoder_attention_mask, labels):
        shifted = F.pad(labels, (1, -1)).masked_fill(F.pad(labels, (1, -1)) == -100, 0)
        encoded = self.encoder(inputs_embeds, attention_mask)[0]
        decoded = self.decoder(self.shared(shifted), decoder_attention_mask, encoded, attention_mask)[0]
        logits = self.lm_head(decoded)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), logits

    @torch.no_grad()
    def generate(self, inputs_embeds: Tensor, attention_mask: Tensor, steps: int) -> Tensor:
        """Decode greedily with a cache of keys and values."""
        encoded = self.encoder(inputs_embeds, attention_mask)[0]
        tokens, past = attention_mask.new_zeros(len(encoded), 1), None
        for _ in range(steps):
            new = self.shared(tokens[:, -1:])
            out, past, _ = self.decoder(new, torch.ones_like(tokens), encoded, attention_mask, past, use_cache=True)
            tokens = torch.cat([tokens, self.lm_head(out).argmax(-1)], 1)
        return tokens


class Adapter(nn.Module):
    def __init__(self, d_model: int, bottleneck: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.adapter_layernorm_option, self.adapter_layer_norm_before = "none", None
        self.scale = nn.Parameter(torch.ones(1))
        self.down_proj, self.up_proj = nn.Linear(d_model, bottleneck), nn.Linear(bottleneck, d_model)
        self.non_linear_func = nn.ReLU()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.non_linear_func(self.down_proj(x)), self.dropout, self.training)
        return self.up_proj(hidden) * self.scale


class AdapterRouter(nn.Module):
    def __init__(self, d_model: int, bottleneck: int, num_adapters: int) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(d_model, bottleneck) for _ in range(num_adapters))
        if num_adapters > 1:
            self.router_ratio1 = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, d_model))
            self.router_ratio2 = nn.Parameter(torch.tensor([[0.0], [1.0]]).repeat(1, d_model))
        self.num_adapters = num_adapters
        self.router_idx: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.router_idx in (0, 1)
        if self.num_adapters == 1:
            return self.adapters[0](x)
        first, second = self.adapters[0](x), self.adapters[1](x)
        return first * self.router_ratio1[self.router_idx] + second * self.router_ratio2[self.router_idx]


def forward_ffn_t5(self, hidden_states):
    adapted = self.adapter(hidden_states)
    return hidden_states + self.dropout(self.DenseReluDense(self.layer_norm(hidden_states))) + adapted


def set_adapter_t5(model: nn.Module, d_model: int, n: int, bottleneck: int) -> None:
    for layer in model.modules():
        if isinstance(layer, T5LayerFF):
            layer.adapter = AdapterRouter(d_model, bottleneck, n)
            layer.forward = forward_ffn_t5.__get__(layer)


def set_router_idx(model: nn.Module, idx: int) -> None:
    for module in model.modules():
        if isinstance(module, AdapterRouter):
            module.router_idx = idx


class LIONT5InstructAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        vision, text = CONFIG.vit.width, CONFIG.t5.width
        self.visual_encoder = VisionTransformer(CONFIG.vit)
        self.Qformer = nn.ModuleDict({"bert": BertModel(CONFIG.qformer, vision)})
        self.query_tokens = nn.Parameter(torch.zeros(1, CONFIG.qformer.num_queries, CONFIG.qformer.width))
        self.ln_vision = nn.LayerNorm(vision)
        self.t5_proj = nn.Linear(CONFIG.qformer.width, text)
        self.fusion_adapter = FusionAdapter(CONFIG.aggregator, vision)
        self.ln_adapter = nn.LayerNorm(vision)
        width = CONFIG.aggregator.projector_width
        self.adapter_proj = nn.Sequential(nn.Linear(vision, width), nn.GELU(), nn.Linear(width, text))
        self.soft_prompt_hint = nn.Parameter(torch.zeros(text))
        self.t5_model = T5ForConditionalGeneration(CONFIG.t5)
        set_adapter_t5(self.t5_model, text, CONFIG.num_adapters, CONFIG.adapter_rank)

    def encode_img(self, samples: dict[str, Tensor]) -> Tensor:
        states = self.visual_encoder(samples["image"])
        last, *earlier = (states[layer] for layer in CONFIG.aggregator.layers)
        queries = self.query_tokens.expand(len(last), -1, -1)
        question, mask = samples["question"], samples["question_mask"]
        encoded = self.Qformer["bert"](question, mask, queries, self.ln_vision(last))
        aggregated = self.adapter_proj(self.ln_adapter(self.fusion_adapter(last, earlier)))
        return torch.cat([self.t5_proj(encoded[:, : queries.shape[1]]), aggregated], 1)

    def inputs(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Set the task of all routers, and return embeddings and their mask."""
        set_router_idx(self.t5_model, int(samples["category"] != "region_level"))
        image = self.encode_img(samples)
        text = self.t5_model.shared(samples["text"])
        is_hint = samples["text"] == CONFIG.soft_prompt_id
        text = torch.where(is_hint.unsqueeze(-1), self.soft_prompt_hint.to(text.dtype), text)
        mask = torch.cat([samples["text_mask"].new_ones(image.shape[:2]), samples["text_mask"]], 1)
        return torch.cat([image, text], 1), mask

    def forward(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return loss and logits."""
        labels = samples["labels"]
        return self.t5_model(*self.inputs(samples), (labels != -100).long(), labels)

    def generate(self, samples: dict[str, Any], steps: int) -> Tensor:
        return self.t5_model.generate(*self.inputs(samples), steps)


def make_original() -> LIONT5InstructAdapter:
    """Return a model in which every part has an influence."""
    torch.manual_seed(0)
    model = LIONT5InstructAdapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name or "hint" in name:
                parameter.normal_(std=0.2 if parameter.dim() > 1 else 0.1)
    return model.eval()


def make_samples(category: str = "region_level") -> dict[str, Any]:
    """Return two samples, one with padding everywhere."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(6, 64, (2, length), generator=generator)

    samples: dict[str, Any] = {
        "image": torch.randn(2, 3, 28, 28, generator=generator),
        "question": ids(5),
        "text": ids(7),
        "labels": ids(4),
        "category": category,
    }
    samples["text"][:, 1] = 5
    samples["labels"][1, 2:] = -100
    samples["question_mask"], samples["text_mask"] = torch.ones(2, 5).long(), torch.ones(2, 7).long()
    samples["question_mask"][1, 3:] = samples["text_mask"][1, 4:] = 0
    return samples
