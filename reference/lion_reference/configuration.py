"""The dimensions of every part of LION. The defaults are those of LION-FlanT5-XL."""

from dataclasses import dataclass, field


@dataclass
class ViTConfig:
    """EVA-CLIP g/14, up to the last block that LION reads."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    num_heads: int = 16
    mlp_width: int = 6144


@dataclass
class QFormerConfig:
    """The Q-Former of InstructBLIP, a BERT. `num_embeddings` counts BERT's vocabulary and one added token."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    num_queries: int = 32
    num_embeddings: int = 30523
    max_positions: int = 512
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1


@dataclass
class AggregatorConfig:
    """`layers` are 0-based ViT blocks: the first gives the initial hidden states, each block attends to one other."""

    layers: tuple[int, ...] = (38, 28, 18)
    num_heads: int = 16
    mlp_width: int = 3072
    projector_width: int = 5632
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1


@dataclass
class T5Config:
    """Flan-T5 XL."""

    width: int = 2048
    head_dim: int = 64
    mlp_width: int = 5120
    num_heads: int = 32
    encoder_depth: int = 24
    decoder_depth: int = 24
    vocab_size: int = 32128
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_eps: float = 1e-6
    dropout: float = 0.1
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0


@dataclass
class LIONConfig:
    """Configuration of `LION`.

    `visual_input` is "ALL", "QFORMER" or "AGGREGATOR". `soft_prompt_id` is the token embedded as `soft_prompt_hint`,
    or None for a model without tags.
    """

    vit: ViTConfig = field(default_factory=ViTConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    t5: T5Config = field(default_factory=T5Config)
    visual_input: str = "ALL"
    adapter_rank: int = 64
    soft_prompt_id: int | None = 32099

    def __post_init__(self) -> None:
        if self.visual_input not in ("ALL", "QFORMER", "AGGREGATOR"):
            raise ValueError(f"visual_input: expected ALL, QFORMER or AGGREGATOR, got {self.visual_input!r}")

    @property
    def has_qformer(self) -> bool:
        return self.visual_input != "AGGREGATOR"

    @property
    def has_aggregator(self) -> bool:
        return self.visual_input != "QFORMER"

    @property
    def num_adapters(self) -> int:
        return 2 if self.visual_input == "ALL" else 1
