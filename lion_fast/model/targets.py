"""The answers as inputs, for losses that transformers' Trainer computes itself.

With `label_smoothing_factor` or a `compute_loss_func`, Trainer takes the labels out of the batch before it calls the
model. Other models of transformers find the answers in `input_ids`, or in the `decoder_input_ids` of
`DataCollatorForSeq2Seq(model=model)`. LION's batches have them in the labels alone, so Trainer has to pass them on.
"""

import sys
from functools import wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lion_fast.configuration_lion import LionConfig
from lion_fast.model.padding import shifted_right


class TargetsMixin:
    """What Trainer and the collators of transformers call to make a model's inputs of its labels."""

    config: LionConfig
    language_model: Any

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
        return F.pad(labels.masked_fill(labels == -100, padding), (1, -1), value=padding)

    def decoder_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return `decoder_input_ids` and `decoder_attention_mask`, with which a call has the logits of `labels`."""
        mask = (labels != -100).long()
        if not self.config.is_encoder_decoder:
            mask = F.pad(mask, (1, -1), value=1)
        return {
            "decoder_input_ids": self.prepare_decoder_input_ids_from_labels(labels),
            "decoder_attention_mask": mask,
        }

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
