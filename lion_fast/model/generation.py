"""Generation: transformers' `generate` on LION's input, for every language model."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from lion_fast.configuration_lion import LionConfig
from lion_fast.model.adapter_names import names_for_rows
from lion_fast.model.generation_arguments import expect_fitting_rows, expect_generation_arguments
from lion_fast.model.image_features import ImageFeatures
from lion_fast.model.inputs import expect_decoder_inputs, expect_encoder_outputs, expect_task_ids
from lion_fast.model.validation import expect_mask


class LionGenerationMixin(GenerationMixin):
    """`generate` of `LionForCausalLM`: the language model's own, on the input that the model's call assembles."""

    config: LionConfig
    language_model: Any

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
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate answers.

        Args:
            pixel_values, ..., inputs_embeds: as for `forward`. With precomputed `encoder_outputs`, only
                `attention_mask` of their shape and `task_ids` are needed.
            kwargs: arguments of transformers' `generate`; `self.generation_config` holds the defaults (LION's own: 5
                beams, repetition penalty 1.5, at most 256 new tokens; top_p 0.9 with `do_sample`). `max_length` and
                `min_length` count the returned ids, also those of a decoder-only language model, which are the answer
                alone. `labels` is ignored, because `Seq2SeqTrainer(predict_with_generate=True)` passes a whole batch.

        Returns:
            Token ids of the answers, int64 [B, 1 + Lt] with an encoder-decoder's start token and [B, Lt] without, or
            the output object if `return_dict_in_generate` is set.

        Raises:
            ValueError: as for `forward`, or an argument of `generate` has a value that it does not take.
            TypeError: an argument is unknown.
        """
        kwargs.pop("labels", None)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        kwargs = expect_generation_arguments(self.config, self.generation_config, kwargs)
        kwargs |= self._start_token(kwargs)
        self.language_model.generation_config = self.generation_config
        with names_for_rows(self):  # type: ignore[arg-type]
            if "encoder_outputs" in kwargs:
                encoded = expect_encoder_outputs(self.config, kwargs["encoder_outputs"])
                batch, task_ids = len(encoded), expect_task_ids(self.config, task_ids, len(encoded))
                if attention_mask is not None:
                    attention_mask = expect_mask("attention_mask", attention_mask, tuple(encoded.shape[:2]))
                # A new object, because beam search repeats its rows in place.
                kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
            else:
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
                    inputs_embeds=inputs_embeds,
                    inputs_only=True,
                    return_dict=True,
                )
                kwargs["inputs_embeds"], attention_mask = inputs.inputs_embeds, inputs.attention_mask
                batch = len(inputs.inputs_embeds)
            kwargs |= self._begun_answers(batch, kwargs)
            expect_fitting_rows(kwargs, self.generation_config, batch, self._tokens_read(kwargs))
            if self.config.has_router and task_ids is not None:
                kwargs["task_ids"] = task_ids.to(torch.int64)
            return self.language_model.generate(attention_mask=attention_mask, **kwargs)

    def _start_token(self, given: dict[str, Any]) -> dict[str, int]:
        """Return T5's start token if no configuration of generation has one, as after Trainer has replaced it."""
        if self.generation_config.decoder_start_token_id is not None or not self.config.is_encoder_decoder:
            return {}
        known = getattr(given.get("generation_config"), "decoder_start_token_id", None) is not None
        start = self.config.text_config.decoder_start_token_id
        return {} if known or start is None else {"decoder_start_token_id": start, **given}

    def _tokens_read(self, given: dict[str, Any]) -> int:
        """Return the number of tokens that the language model reads before its first answer."""
        if not self.config.is_encoder_decoder:
            return given["inputs_embeds"].shape[1]
        return given["decoder_input_ids"].shape[1] if "decoder_input_ids" in given else 1

    def _begun_answers(self, batch: int, given: dict[str, Any]) -> dict[str, Tensor]:
        """Return `decoder_input_ids` and their mask, of those that are given, as int64."""
        names = [name for name in ("decoder_input_ids", "decoder_attention_mask") if name in given]
        if not names:
            return {}
        if not self.config.is_encoder_decoder:
            raise ValueError(f"{names[0]}: expected None for a decoder-only language model")
        ids, mask = map(given.get, ("decoder_input_ids", "decoder_attention_mask"))
        ids, mask = expect_decoder_inputs(self.config, batch, None, ids, None, mask)
        if ids is not None and mask is None and "past_key_values" in given:
            mask = torch.ones_like(ids)  # without one, transformers would read the cached tokens again
        found = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return {name: value for name, value in found.items() if value is not None}


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
