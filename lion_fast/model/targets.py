"""The answers as inputs of the language model, in a call of LION and for losses that Trainer computes itself.

With `label_smoothing_factor` or a `compute_loss_func`, Trainer takes the labels out of the batch before it calls the
model. Other models of transformers find the answers in `input_ids`, or in the `decoder_input_ids` of
`DataCollatorForSeq2Seq(model=model)`. LION's batches have them in the labels alone, so Trainer has to pass them on.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.configuration_lion import LionConfig
from lion_fast.model.padding import IGNORED, padding_repeats, shifted_right


class Targets(NamedTuple):
    """The answers of a call, checked; all None if the text alone is run.

    Args:
        labels: int64 [B, Lt], `IGNORED` at padding.
        decoder_input_ids: int64 [B, Lt], the answers shifted right, instead of those made of `labels`.
        decoder_attention_mask: int64 [B, Lt], 0 at padding of `decoder_input_ids`.
    """

    labels: Tensor | None
    decoder_input_ids: Tensor | None
    decoder_attention_mask: Tensor | None


class TargetsMixin:
    """Runs the language model on LION's input and the answers, and makes inputs of labels for transformers' Trainer."""

    config: LionConfig
    language_model: Any
    get_input_embeddings: Callable[[], nn.Module]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return `decoder_input_ids` whose logits predict `labels`: the answers, shifted right.

        Args:
            labels: int64 [B, Lt]; -100 becomes padding.

        Returns:
            int64 [B, Lt], starting with the encoder-decoder's start token; a decoder-only language model, which
            continues the question, does not read the first token.
        """
        if self.config.is_encoder_decoder:
            return shifted_right(labels, self.language_model.prepare_decoder_input_ids_from_labels(labels))
        padding = self.config.text_config.pad_token_id or 0
        return F.pad(labels.masked_fill(labels == IGNORED, padding), (1, -1), value=padding)

    def decoder_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return `decoder_input_ids` and `decoder_attention_mask`, with which a call has the logits of `labels`."""
        mask = (labels != IGNORED).long()
        if not self.config.is_encoder_decoder:
            mask = F.pad(mask, (1, -1), value=1)
        return {
            "decoder_input_ids": self.prepare_decoder_input_ids_from_labels(labels),
            "decoder_attention_mask": mask,
        }

    def _run_language_model(
        self, inputs_embeds: Tensor, attention_mask: Tensor, targets: Targets, **kwargs: Any
    ) -> Any:
        """Run the language model on its input and the answers.

        Args:
            inputs_embeds: [B, Lv + L, text hidden size], [visual | text].
            attention_mask: int64 [B, Lv + L].
            targets: the answers.
            kwargs: further arguments of the language model.

        Returns:
            The language model's output; its logits are those of the answers if there are any.
        """
        run = self._run_encoder_decoder if self.config.is_encoder_decoder else self._run_decoder_only
        return run(inputs_embeds, attention_mask, targets, return_dict=True, **kwargs)

    def _run_encoder_decoder(
        self, inputs_embeds: Tensor, attention_mask: Tensor, targets: Targets, **kwargs: Any
    ) -> Any:
        labels, ids, mask = targets
        if ids is None and "decoder_inputs_embeds" not in kwargs:
            if labels is None:
                raise ValueError("labels: expected labels or decoder_input_ids for an encoder-decoder, got neither")
            made = self.decoder_inputs(labels)
            ids = made["decoder_input_ids"]
            mask = made["decoder_attention_mask"] if mask is None else mask
        kwargs.update(decoder_input_ids=ids, decoder_attention_mask=mask)
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _run_decoder_only(self, inputs_embeds: Tensor, attention_mask: Tensor, targets: Targets, **kwargs: Any) -> Any:
        """Run on [visual | text | target] and keep the logits that predict the targets."""
        labels, ids, mask = targets
        if ids is not None:
            mask = torch.ones_like(ids) if mask is None else mask
            kwargs["logits_to_keep"] = ids.shape[1]
            ids, mask = ids[:, 1:], mask[:, 1:]  # the question stands for the first
        elif labels is not None:
            ids, mask = labels, (labels != IGNORED).long()
            kwargs["logits_to_keep"] = labels.shape[1] + 1
        if ids is not None and mask is not None:
            repeated, leading = padding_repeats(mask, ids)
            embedded = self.get_input_embeddings()(repeated.masked_fill(leading, 0))
            # Padding before the targets repeats the question's last token.
            embedded = torch.where(leading.unsqueeze(-1), inputs_embeds[:, -1:], embedded)
            inputs_embeds = torch.cat([inputs_embeds, embedded], dim=1)
            attention_mask = torch.cat([attention_mask, mask], dim=1)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),  # padding takes up no positions
            **kwargs,
        )
        if labels is not None and targets.decoder_input_ids is None:
            outputs.logits = outputs.logits[:, :-1]
        return outputs

    def train(self, mode: bool = True) -> Any:
        """Set the mode as any module does; Trainer calls this before each pass, so it is prepared here."""
        _let_trainer_pass_on_targets()
        return super().train(mode)  # type: ignore[misc]


def _let_trainer_pass_on_targets() -> None:
    """Make `Trainer.compute_loss` give the answers to a LION whose labels it takes out of the batch.

    There is nothing of LION's own that Trainer calls with the labels. Other models' losses are not affected.
    """
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or hasattr(trainer.compute_loss, "passes_on_targets"):
        return
    compute_loss = trainer.compute_loss

    @wraps(compute_loss)
    def compute_loss_with_targets(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        takes_labels = self.label_smoother is not None or self.compute_loss_func is not None
        if takes_labels and "labels" in inputs and "decoder_input_ids" not in inputs:
            lion = next((module for module in model.modules() if isinstance(module, TargetsMixin)), None)
            if lion is not None:
                inputs = {"use_cache": False, **inputs, **lion.decoder_inputs(inputs["labels"])}
        return compute_loss(self, model, inputs, *args, **kwargs)

    compute_loss_with_targets.passes_on_targets = True  # type: ignore[attr-defined]
    trainer.compute_loss = compute_loss_with_targets
