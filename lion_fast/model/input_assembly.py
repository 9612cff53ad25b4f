"""Everything before the language model: from images, questions and text to its input, [visual | text]."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lion_fast.configuration_lion import LionConfig
from lion_fast.model.checkpointing import with_gradient
from lion_fast.model.image_features import ImageFeatures
from lion_fast.model.inputs import expect_image_features, expect_question, expect_vision_features
from lion_fast.model.kernel_modules import PrefixEmbedding
from lion_fast.model.padding import padding_last, padding_repeats
from lion_fast.model.validation import expect_ids, expect_shape, expect_values


class InputAssemblyMixin:
    """The part of `LionForCausalLM` that assembles the language model's input."""

    config: LionConfig
    vision_model: Any
    vision_layernorm: nn.Module
    query_tokens: nn.Parameter
    qformer: Any
    qformer_projection: nn.Module
    aggregator: Any
    aggregator_layernorm: nn.Module
    aggregator_projection: nn.Module
    soft_prompt: nn.Parameter
    get_input_embeddings: Callable[[], nn.Module]

    def get_vision_features(self, pixel_values: Tensor) -> Tensor:
        """Return the outputs of the vision blocks that the Q-Former and the aggregator read.

        The tower is frozen in LION, so these features can be computed once per image and passed as `vision_features`,
        in training too. `encode_images` also computes everything else that depends on the image alone.

        Args:
            pixel_values: [B, 3, image_size, image_size].

        Returns:
            [B, S, N, vision hidden size] for the S layers of `config.feature_layers`, in their order.
        """
        return self.vision_model(pixel_values, layers=self.config.feature_layers)

    def encode_images(self, pixel_values: Tensor | None = None, vision_features: Tensor | None = None) -> ImageFeatures:
        """Compute everything that does not depend on the question: vision tower and aggregator.

        `forward` and `generate` take the result, or an indexed selection, as `image_features`: `features[[0, 0, 1]]`
        for two questions about the first image and one about the second. The result is differentiable; use
        `torch.no_grad()` to save memory.

        Args:
            pixel_values: [B, 3, image_size, image_size].
            vision_features: [B, S, N, vision hidden size] from `get_vision_features`, instead of `pixel_values`.

        Raises:
            ValueError: both arguments or neither are given, or a shape does not match.
        """
        if vision_features is None:
            if pixel_values is None:
                raise ValueError("pixel_values: expected either pixel_values or vision_features, got neither")
            vision_features = self.get_vision_features(pixel_values)
        elif pixel_values is not None:
            raise ValueError("pixel_values: expected either pixel_values or vision_features, got both")
        else:
            expect_vision_features(self.config, vision_features)
            expect_values({"vision_features": vision_features}, self.vision_model.cls_token)
        return self._encode(vision_features)

    def _encode(self, vision_features: Tensor) -> ImageFeatures:
        visual_input = self.config.visual_input
        qformer_context = aggregated = None
        if visual_input != "AGGREGATOR":
            qformer_context = self.vision_layernorm(vision_features[:, 0].to(self.query_tokens.dtype))
        if visual_input != "QFORMER":
            hidden_states = self.aggregator(vision_features.to(self.aggregator.dtype))
            aggregated = self.aggregator_projection(self.aggregator_layernorm(hidden_states))
        return ImageFeatures(qformer_context, aggregated)

    def get_visual_prefix(
        self,
        image_features: ImageFeatures,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the visual tokens of the language model's input: the Q-Former's, then the aggregator's.

        Args:
            image_features: features of B images, from `encode_images`.
            qformer_input_ids: int64 [B, Lq], the question in the Q-Former's vocabulary; required if the model has a
                Q-Former.
            qformer_attention_mask: [B, Lq], 0 at padding; all ones if None.

        Returns:
            [B, config.num_visual_tokens, text hidden size].

        Raises:
            ValueError: `qformer_input_ids` is missing, or its batch size differs from that of `image_features`.
        """
        expect_image_features(self.config, image_features)
        return self._visual_prefix(image_features, qformer_input_ids, qformer_attention_mask)

    def _visual_prefix(self, features: ImageFeatures, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        parts = []
        if features.qformer_context is not None:
            parts.append(
                self._run_qformer(features.qformer_context, *expect_question(self.config, len(features), ids, mask))
            )
        if features.aggregated is not None:
            parts.append(features.aggregated)
        return torch.cat([part.to(parts[0].device) for part in parts], dim=1)

    def _run_qformer(self, context: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        attention_mask, input_ids = padding_last(attention_mask, input_ids)
        queries = with_gradient(self.query_tokens.expand(context.shape[0], -1, -1), self.qformer.encoder.layer)
        attend_queries = attention_mask.new_ones(queries.shape[:2])
        hidden_states = self.qformer(
            input_ids=input_ids,
            attention_mask=torch.cat([attend_queries, attention_mask], dim=1),
            query_embeds=queries,
            encoder_hidden_states=context,
            return_dict=True,
        ).last_hidden_state
        return self.qformer_projection(hidden_states[:, : queries.shape[1]])

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Return token embeddings [B, L, text hidden size] of `input_ids` [B, L], with the soft prompt in its place.

        Raises:
            ValueError: an id is out of range.
        """
        expect_shape("input_ids", input_ids, ("B", None))
        expected = self.config.text_config.vocab_size, self.config.soft_prompt_token_id
        return self._embed_text(expect_ids("input_ids", input_ids, *expected))

    def _embed_text(self, input_ids: Tensor) -> Tensor:
        embedding = self.get_input_embeddings()
        if self.config.soft_prompt_token_id is None:
            return embedding(input_ids)
        is_soft_prompt = input_ids == self.config.soft_prompt_token_id
        embeddings = embedding(input_ids.masked_fill(is_soft_prompt, 0))  # the token may lie beyond the table
        soft_prompt = self.soft_prompt.to(embeddings.device, embeddings.dtype)
        return torch.where(is_soft_prompt.unsqueeze(-1).to(embeddings.device), soft_prompt, embeddings)

    def _embed(self, prefix: Tensor, text: Tensor) -> Tensor:
        """Return the language model's input, [visual | text], for the text's ids [B, L] or embeddings [B, L, D]."""
        embedding, soft_prompt_id = self.get_input_embeddings(), self.config.soft_prompt_token_id
        if text.dim() == 3:
            weight: Any = embedding.weight
            text = text.to(weight.dtype)
        # A module that replaces the embedding, such as LoRA's, takes no prefix.
        elif isinstance(embedding, PrefixEmbedding) and embedding.assembles and soft_prompt_id is not None:
            return embedding(text, prefix, self.soft_prompt, soft_prompt_id)
        else:
            text = self._embed_text(text)
        return torch.cat([prefix.to(text.device, text.dtype), text], dim=1)

    def _pad(self, text: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the text and its mask with padding where the language model takes it."""
        if attention_mask is None:
            return text, torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        if self.config.is_encoder_decoder:
            attention_mask, text = padding_last(attention_mask, text)
        else:
            text, _ = padding_repeats(attention_mask, text)
        return text, attention_mask
