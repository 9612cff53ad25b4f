"""Language models with a mixture of adapters in every feed-forward layer: T5 and decoder-only families.

The classes are those of transformers with one more submodule, `adapter`, beside each feed-forward; parameter names are
the family's. `forward` passes `task_ids` [B] to the adapters as a keyword argument, so a batch may mix tasks.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.t5.modeling_t5 import T5Block, T5LayerFF, T5Stack

from lion_fast.model.adapters import LowRankAdapter, MixtureOfAdapters
from lion_fast.model.generation_arguments import count_the_answer_alone, let_the_call_win


class AdapterInitMixin:
    """Initialises adapters and routers.

    transformers calls `_init_weights` of the nearest PreTrainedModel above a module, and only for modules that own
    parameters.
    """

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, LowRankAdapter | MixtureOfAdapters):
            module.reset_parameters()


class TaskInGenerationMixin(AdapterInitMixin):
    """Passes `task_ids` through `generate` to every step, and lets a call's settings win over the checkpoint's."""

    config: Any
    generation_config: Any

    def _prepare_generation_config(self, generation_config: Any, *args, **kwargs) -> tuple[Any, dict[str, Any]]:
        prepared, inputs = super()._prepare_generation_config(generation_config, *args, **kwargs)  # type: ignore[misc]
        let_the_call_win(prepared, generation_config, kwargs, self.generation_config)
        if not self.config.is_encoder_decoder and "inputs_embeds" in inputs:
            prompt = inputs["inputs_embeds"].shape[1]
            count_the_answer_alone(prepared, generation_config, kwargs, self.generation_config, prompt)
        return prepared, inputs

    def prepare_inputs_for_generation(
        self,
        *args,
        inputs_embeds: Tensor | None = None,  # `generate` looks for this name in the signature
        task_ids: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]
        return {**inputs, "task_ids": task_ids}


class LionT5LayerFF(T5LayerFF):
    """h + dropout(FFN(norm(h))) + adapters(h)."""

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.adapter = MixtureOfAdapters(config)

    def forward(self, hidden_states: Tensor, task_ids: Tensor | None = None) -> Tensor:
        return self.adapter(hidden_states, residual=super().forward(hidden_states), task_ids=task_ids)


class LionT5Block(T5Block):
    """T5's block, which passes `task_ids` to the feed-forward."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool = False, layer_idx: int | None = None):
        super().__init__(config, has_relative_attention_bias=has_relative_attention_bias, layer_idx=layer_idx)
        self.layer[-1] = LionT5LayerFF(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        past_key_values: Any = None,
        task_ids: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden_states, position_bias, _ = self.layer[0](
            hidden_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = _clamp_fp16(hidden_states)
        if self.is_decoder and encoder_hidden_states is not None:
            hidden_states, encoder_decoder_position_bias, _ = self.layer[1](
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                position_bias=encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = _clamp_fp16(hidden_states)
        hidden_states = _clamp_fp16(self.layer[-1](hidden_states, task_ids=task_ids))
        return hidden_states, position_bias, encoder_decoder_position_bias


def _clamp_fp16(hidden_states: Tensor) -> Tensor:
    """Clamp float16 activations to finite values: T5's residual stream overflows in float16."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    limit = torch.finfo(torch.float16).max - 1000
    return hidden_states.clamp(min=-limit, max=limit)


class LionT5Stack(AdapterInitMixin, T5Stack):
    def __init__(self, config: T5Config):
        super().__init__(config)
        for index in range(len(self.block)):
            self.block[index] = LionT5Block(config, has_relative_attention_bias=index == 0, layer_idx=index)
        self.post_init()


class LionT5ForConditionalGeneration(TaskInGenerationMixin, T5ForConditionalGeneration):
    """T5 with adapters. The output head is Flan's, never tied to the embeddings."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    _no_split_modules: ClassVar[list[str]] = ["LionT5Block"]

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.encoder = LionT5Stack(self.encoder.config)
        self.decoder = LionT5Stack(self.decoder.config)
        self.post_init()

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that the input flows through, in order."""
        return [*self.encoder.block, *self.decoder.block]


class AdaptedDecoderLayer:
    """A pre-norm decoder layer (attention, then feed-forward) with adapters on the input of the second norm."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.adapter = MixtureOfAdapters(config)

    def forward(self, hidden_states: Tensor, *, task_ids: Tensor | None = None, **kwargs) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        fed_forward = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.adapter(hidden_states, residual=hidden_states + fed_forward, task_ids=task_ids)


class AdaptedDecoder(AdapterInitMixin):
    """A decoder with layers of class `layer_class`."""

    layer_class: ClassVar[Any]
    layers: nn.ModuleList
    post_init: Any

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)  # type: ignore[call-arg]
        for index in range(len(self.layers)):
            self.layers[index] = self.layer_class(config, index)
        self.post_init()


class AdaptedCausalLM(TaskInGenerationMixin):
    """A causal language model with a decoder of class `decoder_class`."""

    decoder_class: ClassVar[Any]
    post_init: Any

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.decoder_class(config)
        self.post_init()

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that the input flows through, in order."""
        return list(self.model.layers)


class LionLlamaDecoderLayer(AdaptedDecoderLayer, LlamaDecoderLayer):
    pass


class LionLlamaModel(AdaptedDecoder, LlamaModel):
    layer_class = LionLlamaDecoderLayer


class LionLlamaForCausalLM(AdaptedCausalLM, LlamaForCausalLM):
    decoder_class = LionLlamaModel
    _no_split_modules: ClassVar[list[str]] = ["LionLlamaDecoderLayer"]


class LionQwen2DecoderLayer(AdaptedDecoderLayer, Qwen2DecoderLayer):
    pass


class LionQwen2Model(AdaptedDecoder, Qwen2Model):
    layer_class = LionQwen2DecoderLayer


class LionQwen2ForCausalLM(AdaptedCausalLM, Qwen2ForCausalLM):
    decoder_class = LionQwen2Model
    _no_split_modules: ClassVar[list[str]] = ["LionQwen2DecoderLayer"]


class LionQwen3DecoderLayer(AdaptedDecoderLayer, Qwen3DecoderLayer):
    pass


class LionQwen3Model(AdaptedDecoder, Qwen3Model):
    layer_class = LionQwen3DecoderLayer


class LionQwen3ForCausalLM(AdaptedCausalLM, Qwen3ForCausalLM):
    decoder_class = LionQwen3Model
    _no_split_modules: ClassVar[list[str]] = ["LionQwen3DecoderLayer"]


LANGUAGE_MODELS: dict[str, type[PreTrainedModel]] = {
    "t5": LionT5ForConditionalGeneration,
    "llama": LionLlamaForCausalLM,
    "qwen2": LionQwen2ForCausalLM,
    "qwen3": LionQwen3ForCausalLM,
}


def language_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class with adapters for a language model's configuration.

    Raises:
        ValueError: `config.model_type` is not in `LANGUAGE_MODELS`.
    """
    if config.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"text_config.model_type: expected one of {', '.join(map(repr, LANGUAGE_MODELS))}, "
            f"got {config.model_type!r}"
        )
    return LANGUAGE_MODELS[config.model_type]
