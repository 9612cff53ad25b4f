"""Models of a few thousand parameters with random weights, their batches, and processors that read scenes for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import BlipImageProcessorPil

from lion_fast import LionConfig, LionForCausalLM, LionProcessor, RamConfig, RamTagger
from lion_fast.demo.answering import Answerer
from lion_fast.quickstart.vocabulary import build_qformer_tokenizer, build_text_tokenizer, scene_texts

Batch = dict[str, Tensor]
FAMILIES = ("t5", "llama", "qwen2", "qwen3")
PART: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
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
DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
PARTS: dict[str, dict[str, Any]] = {
    "vision_config": {**PART, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
    "qformer_config": {
        **PART,
        **NO_DROPOUT,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "max_position_embeddings": 32,
    },
    "aggregator_config": {
        **PART,
        **NO_DROPOUT,
        "num_attention_heads": 4,
        "feature_layers": [2, 1, 0],
        "projection_size": 40,
    },
}


def make_config(
    family: str = "t5", processor: LionProcessor | None = None, text: Mapping[str, Any] = {}, **overrides: Any
) -> LionConfig:
    """Make a configuration for any language model.

    Args:
        processor: gives the numbers of tokens, otherwise 64 each, and the soft prompt's token, otherwise 5.
        text: settings of the language model that differ.
        overrides: settings of `LionConfig`; those of vision tower, Q-Former and aggregator only as far as they differ.
    """
    parts = {name: settings | overrides.get(name, {}) for name, settings in PARTS.items()}
    text = {**(T5 if family == "t5" else {"model_type": family, **DECODER}), **text}
    token_id = 5
    if processor is not None:
        text["vocab_size"] = len(processor.tokenizer)
        parts["qformer_config"]["vocab_size"] = len(processor.qformer_tokenizer)
        token_id = processor.soft_prompt_token_id
    settings = {"text_config": text, "num_query_tokens": 4, "adapter_rank": 8, "soft_prompt_token_id": token_id}
    return LionConfig(**{**settings, **overrides, **parts})


def make_model(family: str = "t5", seed: int = 0, **overrides: Any) -> LionForCausalLM:
    """Make a model of `make_config` whose up-projections are not zero, as a new model's are."""
    torch.manual_seed(seed)
    model = LionForCausalLM(make_config(family, **overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name or ("aggregator" in name and "output.dense" in name):
                parameter.normal_(std=0.1)
    return model.eval()


def make_batch(
    batch: int = 3, image_size: int = 28, labels: bool = False, masks: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Make random inputs for the models of `make_model`, with alternating tasks."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(6, 64, (batch, length), generator=generator)

    made = {
        "pixel_values": torch.randn(batch, 3, image_size, image_size, generator=generator),
        "input_ids": ids(7),
        "qformer_input_ids": ids(5),
        "task_ids": torch.arange(batch) % 2,
    }
    made["input_ids"][:, 1] = 5  # the soft prompt's token
    if labels:
        made["labels"] = ids(4)
    if masks:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        made["qformer_attention_mask"] = torch.ones_like(made["qformer_input_ids"])
    return made


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def scene_processor(num_scenes: int, is_encoder_decoder: bool = True, **options: Any) -> LionProcessor:
    """Build a processor of 28 x 28 images with the words of `num_scenes` scenes; `options` are `LionProcessor`'s."""
    texts = scene_texts(num_scenes)
    tokenizer = build_text_tokenizer(texts)
    if not is_encoder_decoder:  # a decoder-only model's prompts must not end with EOS
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    image_processor = BlipImageProcessorPil(size={"height": 28, "width": 28})
    qformer_tokenizer = build_qformer_tokenizer(texts)
    return LionProcessor(
        image_processor, tokenizer, qformer_tokenizer, is_encoder_decoder=is_encoder_decoder, **options
    )


def make_answerer(family: str = "t5", **overrides: Any) -> Answerer:
    """Make a model of `make_model`, whose answers are random, and a processor for any ASCII text."""
    processor = scene_processor(40, is_encoder_decoder=family == "t5", max_txt_len=32)
    model = make_model(family, processor=processor, **overrides)
    model.generation_config.update(num_beams=1, max_new_tokens=8, repetition_penalty=1.0)
    return Answerer(model, processor)


def make_tagger(tags: Sequence[str], thresholds: Sequence[float]) -> RamTagger:
    """Make a tagger of 32 x 32 images."""
    torch.manual_seed(0)
    config = RamConfig(
        vision_config={"image_size": 32, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4},
        num_tags=len(tags),
        label_size=16,
        projection_size=24,
        hidden_size=32,
        intermediate_size=48,
        initializer_range=0.3,
    )
    return RamTagger(config, tags, thresholds).eval()
