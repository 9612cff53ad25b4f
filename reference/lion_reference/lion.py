"""LION (CVPR 2024, arXiv 2311.11860): a ViT, whose outputs a Q-Former and a vision aggregator pass to a Flan-T5 with a
mixture of adapters, chosen by task, in every feed-forward layer.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .aggregator import Aggregator
from .assemble_inputs import assemble_inputs
from .checkpoint import read_checkpoint_files
from .configuration import LIONConfig
from .qformer import QFormer
from .t5 import T5
from .vit import ViT

IGNORED_LABEL = -100


@dataclass
class EncodedInputs:
    """Inputs of the decoder.

    visual_prefix: [B, P, D]; inputs_embeds, encoder_output: [B, P + L, D]; attention_mask: [B, P + L].
    """

    visual_prefix: Tensor
    inputs_embeds: Tensor
    attention_mask: Tensor
    encoder_output: Tensor


@dataclass
class LIONOutput(EncodedInputs):
    """loss: mean cross-entropy over the tokens whose label is not -100; logits: [B, Lt, vocabulary]."""

    loss: Tensor
    logits: Tensor


class LION(nn.Module):
    """The model, with the parameter names of the published checkpoints. ViT and T5 are frozen, the rest is trained."""

    def __init__(self, config: LIONConfig) -> None:
        super().__init__()
        self.config = config
        vision, text = config.vit.width, config.t5.width
        self.visual_encoder = ViT(config.vit).requires_grad_(False)
        if config.has_qformer:
            self.Qformer = nn.ModuleDict({"bert": QFormer(config.qformer, vision)})
            self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.qformer.num_queries, config.qformer.width))
            self.ln_vision = nn.LayerNorm(vision)
            self.t5_proj = nn.Linear(config.qformer.width, text)
        if config.has_aggregator:
            projector_width = config.aggregator.projector_width
            self.fusion_adapter = Aggregator(config.aggregator, vision)
            self.ln_adapter = nn.LayerNorm(vision)
            self.adapter_proj = nn.Sequential(
                nn.Linear(vision, projector_width), nn.GELU(), nn.Linear(projector_width, text)
            )
        if config.soft_prompt_id is not None:
            self.soft_prompt_hint = nn.Parameter(torch.randn(text))
        self.t5_model = T5(config.t5, config.adapter_rank, config.num_adapters)
        for name, parameter in self.t5_model.named_parameters():
            parameter.requires_grad_(".adapter." in name)

    @classmethod
    def from_checkpoint_files(
        cls,
        *,
        vit: str | Path,
        llm: str | Path,
        bert: str | Path,
        lion: str | Path,
        image_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load the model from the original's files, in eval mode.

        Args:
            vit: file of EVA's state dict.
            llm: directory of Flan-T5.
            bert: directory of the BERT that initialised the Q-Former.
            lion: file of the trained parameters.
            image_size: side of the images in pixels; another size than the ViT's interpolates its position embeddings.

        Warns of keys in the files that LION does not use. Raises ValueError naming missing keys.
        """
        config, state_dict = read_checkpoint_files(vit=vit, llm=llm, bert=bert, lion=lion, image_size=image_size)
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict().keys()
        if missing := sorted(expected - state_dict.keys()):
            raise ValueError(f"checkpoint files: missing keys {missing}")
        if ignored := sorted(state_dict.keys() - expected):
            warnings.warn(f"checkpoint files: ignored keys {ignored}", stacklevel=2)
        model.load_state_dict({name: state_dict[name].to(dtype) for name in expected}, assign=True)
        return model.eval()

    def visual_prefix(
        self, pixel_values: Tensor, qformer_input_ids: Tensor | None, qformer_attention_mask: Tensor | None
    ) -> Tensor:
        """pixel_values [B, 3, H, W], the Q-Former's question [B, Lq] -> [B, P, D], Q-Former before aggregator."""
        states = self.visual_encoder(pixel_values)
        last, *earlier = (states[layer] for layer in self.config.aggregator.layers)
        prefix = []
        if self.config.has_qformer:
            if qformer_input_ids is None or qformer_attention_mask is None:
                raise ValueError("qformer_input_ids, qformer_attention_mask: expected [B, Lq] each, got None")
            queries = self.Qformer["bert"](
                self.query_tokens, qformer_input_ids, qformer_attention_mask, self.ln_vision(last)
            )
            prefix.append(self.t5_proj(queries))
        if self.config.has_aggregator:
            prefix.append(self.adapter_proj(self.ln_adapter(self.fusion_adapter(last, earlier))))
        return torch.cat(prefix, dim=1)

    def encode(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> EncodedInputs:
        """Compute everything up to the encoder's output; the arguments are those of `forward`."""
        visual_prefix = self.visual_prefix(pixel_values, qformer_input_ids, qformer_attention_mask)
        embedding, soft_prompt_id = self.t5_model.shared.weight, self.config.soft_prompt_id
        if soft_prompt_id is None:
            inputs_embeds = torch.cat([visual_prefix, embedding[input_ids]], dim=1)
        else:
            inputs_embeds = assemble_inputs(visual_prefix, input_ids, embedding, self.soft_prompt_hint, soft_prompt_id)
        mask = torch.cat([attention_mask.new_ones(visual_prefix.shape[:2]), attention_mask], dim=1)
        return EncodedInputs(visual_prefix, inputs_embeds, mask, self.t5_model.encode(inputs_embeds, mask, task_ids))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        labels: Tensor,
    ) -> LIONOutput:
        """Compute the loss of the answers `labels`.

        Args:
            pixel_values: [B, 3, H, W], in the model's dtype.
            input_ids, attention_mask: [B, L], tags and question for T5.
            qformer_input_ids, qformer_attention_mask: [B, Lq], the question for the Q-Former, if the model has one.
            task_ids: [B], 0 region_level, 1 image_level, if the model has two adapters.
            labels: [B, Lt]; -100 is ignored.

        Raises ValueError if an argument is missing or does not match.
        """
        encoded = self.encode(
            pixel_values, input_ids, attention_mask, qformer_input_ids, qformer_attention_mask, task_ids
        )
        is_target = labels != IGNORED_LABEL
        start = labels.new_full((len(labels), 1), self.config.t5.decoder_start_token_id)
        shifted = torch.cat([start, labels.where(is_target, self.config.t5.pad_token_id)[:, :-1]], dim=1)
        logits = self.t5_model.decode(shifted, is_target, encoded.encoder_output, encoded.attention_mask, task_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        return LIONOutput(**vars(encoded), loss=loss, logits=logits)
