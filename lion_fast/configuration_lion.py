"""Configuration of LION: vision tower, Q-Former, vision aggregator, language model, adapters and tags."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, InstructBlipQFormerConfig, PreTrainedConfig

from lion_fast.io.settings import CheckedSettings, expect_settings
from lion_fast.tasks import TASKS

VISUAL_INPUTS = ("ALL", "QFORMER", "AGGREGATOR")
KERNEL_BACKENDS = ("auto", "triton", "torch")
TEXT_MODELS = ("t5", "llama", "qwen2", "qwen3")


class LionVisionConfig(CheckedSettings, PreTrainedConfig):
    """Configuration of the frozen vision tower. The defaults are EVA-g/14 as LION uses it (39 blocks, no final norm).

    Args:
        hidden_size: width of the patch tokens.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads; head_dim = hidden_size / num_attention_heads (88 in EVA-g).
        intermediate_size: width of the MLP.
        image_size: side of the square input in pixels; the model's `set_image_size` changes it.
        patch_size: side of a patch in pixels.
    """

    model_type = "lion_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1408
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def num_tokens(self) -> int:
        """Number of tokens per image: one class token and one token per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


class LionAggregatorConfig(CheckedSettings, PreTrainedConfig):
    """Configuration of the vision aggregator (paper, section 3.2), with one block per feature map after the first.

    Args:
        hidden_size: width, equal to the vision tower's.
        feature_layers: 0-based indices of the vision blocks whose outputs are aggregated. The first output is the
            initial hidden states and the Q-Former's input; each further output feeds one block's cross-attention.
        projection_size: hidden width of the projector between the aggregator and the language model.
    """

    model_type = "lion_aggregator"
    base_config_key = "aggregator_config"

    hidden_size: int = 1408
    num_attention_heads: int = 16
    intermediate_size: int = 3072
    feature_layers: list[int] | tuple[int, ...] = (38, 28, 18)
    projection_size: int = 5632
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


class LionConfig(CheckedSettings, PreTrainedConfig):
    """Configuration of `LionForCausalLM`. The defaults are LION-FlanT5-XL.

    Args:
        vision_config, qformer_config, aggregator_config, text_config: configuration of each part, as an object or a
            dict. `text_config` may have any model type that `LionForCausalLM` supports: `t5`, or the decoder-only
            `llama`, `qwen2` and `qwen3`.
        visual_input: which visual tokens the language model reads: `"ALL"` (Q-Former, then aggregator),
            `"QFORMER"` or `"AGGREGATOR"`.
        num_query_tokens: number of learned queries of the Q-Former.
        num_adapters: number of adapters per feed-forward layer, 1 or 2; defaults to 2 with `"ALL"` and to 1 otherwise.
            A router weights two adapters by task (paper, section 3.3).
        adapter_rank: inner width of an adapter.
        soft_prompt_token: token whose embedding the learned soft prompt replaces; None for a model without tags.
        soft_prompt_token_id: id of `soft_prompt_token`; may lie beyond the language model's embedding table.
        kernel_backend: backend of attention, norms, the gated feed-forward, the adapters and the input assembly:
            `"triton"` (lion_kernels, on CUDA or in Triton's interpreter), `"torch"`, or `"auto"`, which selects
            `"triton"` for CUDA tensors and `"torch"` for others. An explicit `attn_implementation` takes precedence.

    Raises:
        ValueError: a setting has the wrong type or range, or does not fit another; see `expect_valid`.
    """

    model_type = "lion"
    # Trainer.predict must not gather these outputs: the lengths of the cache and hidden states differ between batches.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["visual_prefix", "language_model_outputs"]
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": LionVisionConfig,
        "qformer_config": InstructBlipQFormerConfig,
        "aggregator_config": LionAggregatorConfig,
        "text_config": AutoConfig,
    }

    vision_config: Any = None
    qformer_config: Any = None
    aggregator_config: Any = None
    text_config: Any = None
    visual_input: str = "ALL"
    num_query_tokens: int = 32
    num_adapters: int | None = None
    adapter_rank: int = 64
    soft_prompt_token: str | None = "<extra_id_0>"
    soft_prompt_token_id: int | None = 32099
    kernel_backend: str = "auto"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        expect_settings("", {**vars(self), **kwargs}, type(self))
        self.vision_config = _part("vision_config", self.vision_config, LionVisionConfig)
        self.qformer_config = _part("qformer_config", self.qformer_config, InstructBlipQFormerConfig)
        self.aggregator_config = _part("aggregator_config", self.aggregator_config, LionAggregatorConfig)
        self.text_config = _text_part(self.text_config)
        if self.num_adapters is None:
            self.num_adapters = 2 if self.visual_input == "ALL" else 1
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.is_encoder_decoder = self.text_config.is_encoder_decoder
        self.pad_token_id = getattr(self.text_config, "pad_token_id", None)
        self.eos_token_id = getattr(self.text_config, "eos_token_id", None)
        self.expect_valid()
        self.share_settings()
        super().__post_init__(**kwargs)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """0-based indices of the vision blocks whose outputs are read; the Q-Former reads the first."""
        layers = tuple(self.aggregator_config.feature_layers)
        return layers[:1] if self.visual_input == "QFORMER" else layers

    @property
    def has_router(self) -> bool:
        """Whether a router weights the adapters by task."""
        return self.num_adapters != 1

    @property
    def num_visual_tokens(self) -> int:
        """Length of the visual prefix in the language model's input."""
        queries = self.num_query_tokens if self.visual_input != "AGGREGATOR" else 0
        patches = self.vision_config.num_tokens if self.visual_input != "QFORMER" else 0
        return queries + patches

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """Return the language model's configuration, where transformers looks up layers, heads and vocabulary."""
        return self.text_config.get_text_config(*args, **kwargs)

    def share_settings(self) -> None:
        """Copy the adapters' and kernels' settings into the parts' configurations, where their layers read them."""
        self.text_config.num_adapters = self.num_adapters
        self.text_config.adapter_rank = self.adapter_rank
        self.text_config.num_tasks = len(TASKS)
        for part in self.sub_configs:
            getattr(self, part).kernel_backend = self.kernel_backend
            getattr(
                self, part
            ).return_dict = True  # LION reads the parts' outputs by name; its own setting is for users

    def expect_valid(self) -> None:
        """Check all settings, also those that were changed after the configuration was made.

        Raises:
            ValueError: a setting is unknown, out of its range, or does not fit another.
        """
        super().expect_valid()
        _expect_one_of("visual_input", self.visual_input, VISUAL_INPUTS)
        _expect_one_of("kernel_backend", self.kernel_backend, KERNEL_BACKENDS)
        self._check_own()
        self._check_text(self.text_config)
        self._check_parts()

    def _check_text(self, text: PreTrainedConfig) -> None:
        _expect_one_of("text_config.model_type", text.model_type, TEXT_MODELS)
        if self.is_encoder_decoder != text.is_encoder_decoder:
            raise ValueError(
                f"is_encoder_decoder: expected {text.is_encoder_decoder} for text_config.model_type "
                f"{text.model_type!r}, got {self.is_encoder_decoder!r}"
            )
        for name in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(text, name, None)
            if token is not None and token >= text.vocab_size:
                raise ValueError(
                    f"text_config.{name}: expected an id below {text.vocab_size} (text_config.vocab_size), got {token}"
                )

    def _check_own(self) -> None:
        if self.num_adapters not in (1, len(TASKS)):
            raise ValueError(f"num_adapters: expected 1 or {len(TASKS)}, got {self.num_adapters}")
        if self.adapter_rank < 1:
            raise ValueError(f"adapter_rank: expected 1 or more, got {self.adapter_rank}")
        if self.num_query_tokens < 1 and self.visual_input != "AGGREGATOR":
            raise ValueError(f"num_query_tokens: expected 1 or more, got {self.num_query_tokens}")
        if self.soft_prompt_token_id is not None and self.soft_prompt_token_id < 0:
            raise ValueError(f"soft_prompt_token_id: expected 0 or more, or None, got {self.soft_prompt_token_id}")

    def _check_parts(self) -> None:
        vision, aggregator, qformer = self.vision_config, self.aggregator_config, self.qformer_config
        has_aggregator = self.visual_input != "QFORMER"
        if has_aggregator and aggregator.hidden_size != vision.hidden_size:
            raise ValueError(
                f"aggregator_config.hidden_size: expected {vision.hidden_size} (vision_config.hidden_size), "
                f"got {aggregator.hidden_size}"
            )
        has_qformer = self.visual_input != "AGGREGATOR"
        if has_qformer and (qformer.pad_token_id or 0) >= qformer.vocab_size:
            raise ValueError(
                f"qformer_config.pad_token_id: expected an id below {qformer.vocab_size} (qformer_config.vocab_size), "
                f"got {qformer.pad_token_id}"
            )
        attending = {"vision_config": vision} | ({"aggregator_config": aggregator} if has_aggregator else {})
        attending |= {"qformer_config": qformer} if has_qformer else {}
        for name, part in attending.items():
            if part.hidden_size % part.num_attention_heads:
                raise ValueError(
                    f"{name}.num_attention_heads: expected a divisor of hidden_size {part.hidden_size}, "
                    f"got {part.num_attention_heads}"
                )
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"vision_config.image_size: expected a multiple of patch_size {vision.patch_size}, "
                f"got {vision.image_size}"
            )
        if not all(0 <= layer < vision.num_hidden_layers for layer in self.feature_layers):
            raise ValueError(
                f"aggregator_config.feature_layers: expected blocks in 0..{vision.num_hidden_layers - 1} "
                f"(vision_config.num_hidden_layers = {vision.num_hidden_layers}), got {list(self.feature_layers)}"
            )


def _expect_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _part(name: str, value: dict | PreTrainedConfig | None, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    if value is None:
        return config_class()
    if not isinstance(value, dict | config_class):
        raise ValueError(f"{name}: expected a dict or {config_class.__name__}, got {type(value).__name__}")
    expect_settings(f"{name}.", value)
    if isinstance(value, config_class):
        return value
    fields: Any = value
    if (found := fields.get("model_type", config_class.model_type)) != config_class.model_type:
        raise ValueError(f"{name}.model_type: expected {config_class.model_type!r}, got {found!r}")
    return config_class(**fields)


def _text_part(value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if value is not None and not isinstance(value, dict | PreTrainedConfig):
        raise ValueError(f"text_config: expected a dict or a configuration, got {value!r}")
    if value is not None:
        expect_settings("text_config.", value)
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value) if value is not None else dict(FLAN_T5_XL)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"text_config: expected a key 'model_type' such as 't5' or 'llama', got {sorted(fields)}")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"text_config.model_type: expected a model type of transformers, got {model_type!r}")
    config = AutoConfig.for_model(model_type, **fields)
    # T5Config's constructor replaces Flan's activation with the tanh approximation; LION uses the exact GELU.
    if "dense_act_fn" in fields:
        config.dense_act_fn = fields["dense_act_fn"]
    return config


FLAN_T5_XL = {
    "model_type": "t5",
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
FLAN_T5_XXL = {**FLAN_T5_XL, "d_model": 4096, "d_ff": 10240, "num_heads": 64}


AutoConfig.register("lion", LionConfig)
AutoConfig.register("lion_vision", LionVisionConfig)
AutoConfig.register("lion_aggregator", LionAggregatorConfig)
