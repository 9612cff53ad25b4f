"""Generation: transformers' `generate` on LION's input, for every language model."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from lion_fast.configuration_lion import LionConfig
from lion_fast.model.image_features import ImageFeatures


class LionGenerationMixin(GenerationMixin):
    """`generate` of `LionForCausalLM`: the language model's own, on the input that the model's call assembles."""

    config: LionConfig
    language_model: Any
    _check_task_ids: Any

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        vision_features: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate answers.

        Args:
            pixel_values, ..., image_features: as for `forward`. With precomputed `encoder_outputs`, only
                `attention_mask` and `task_ids` are needed.
            kwargs: arguments of transformers' `generate`; `self.generation_config` holds the defaults (LION's own: 5
                beams, repetition penalty 1.5, at most 256 new tokens; top_p 0.9 with `do_sample`). `labels` is
                ignored, because `Seq2SeqTrainer(predict_with_generate=True)` passes a whole batch.

        Returns:
            Token ids of the answers, int64 [B, 1 + Lt] with an encoder-decoder's start token and [B, Lt] without, or
            the output object if `return_dict_in_generate` is set.
        """
        kwargs.pop("labels", None)
        if isinstance(kwargs.get("custom_generate"), str):
            kwargs.setdefault("trust_remote_code", False)  # otherwise transformers asks whether to run its code
        if kwargs.get("do_sample"):
            kwargs.setdefault("top_p", 0.9)  # not in the generation config: beam search would warn
        self.language_model.generation_config = self.generation_config
        if "encoder_outputs" not in kwargs:
            # Through the model's call, for which offloading and sharding load the model's own parameters.
            model: Any = self
            inputs = model(
                pixel_values=pixel_values,
                input_ids=input_ids,
                attention_mask=attention_mask,
                qformer_input_ids=qformer_input_ids,
                qformer_attention_mask=qformer_attention_mask,
                task_ids=task_ids,
                vision_features=vision_features,
                image_features=image_features,
                inputs_only=True,
            )
            kwargs["inputs_embeds"], attention_mask = inputs.inputs_embeds, inputs.attention_mask
        else:
            self._check_task_ids(task_ids, kwargs["encoder_outputs"][0].shape[0])
        if self.config.has_router:
            kwargs["task_ids"] = task_ids
        return self.language_model.generate(attention_mask=attention_mask, **kwargs)


def lion_generation_config(config: LionConfig) -> GenerationConfig:
    """Return LION's generation defaults with the token ids of the language model."""
    text = config.text_config
    return GenerationConfig(
        num_beams=5,
        max_new_tokens=256,
        min_length=1,
        repetition_penalty=1.5,
        length_penalty=1.0,
        decoder_start_token_id=getattr(text, "decoder_start_token_id", None),
        bos_token_id=getattr(text, "bos_token_id", None),
        eos_token_id=getattr(text, "eos_token_id", None),
        pad_token_id=getattr(text, "pad_token_id", None),
    )
