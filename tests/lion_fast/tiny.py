"""Settings of models of a few thousand parameters, and a processor that reads scenes for them."""

from typing import Any

from torch import Tensor
from transformers import BlipImageProcessorPil

from lion_fast import LionProcessor
from lion_fast.quickstart.vocabulary import build_qformer_tokenizer, build_text_tokenizer, scene_texts

PART: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION: dict[str, Any] = {**PART, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
QFORMER: dict[str, Any] = {**PART, "num_hidden_layers": 2}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    # With random weights of the usual scale, the answers would hardly depend on the input.
    "initializer_factor": 0.3,
}


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def scene_processor(num_scenes: int, tokenizer: Any = None, **options: Any) -> LionProcessor:
    """Build a processor of 28 x 28 images with the words of `num_scenes` scenes; `options` are `LionProcessor`'s."""
    texts = scene_texts(num_scenes)
    return LionProcessor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer or build_text_tokenizer(texts),
        build_qformer_tokenizer(texts),
        **options,
    )
