"""The quickstart's small LION: the architecture of the published model at a thousandth of its size."""

from transformers import BlipImageProcessorPil

from lion_fast.configuration_lion import FLAN_T5_XL, LionConfig
from lion_fast.processing_lion import LionProcessor
from lion_fast.quickstart.vocabulary import build_qformer_tokenizer, build_text_tokenizer, scene_texts

# 100 pixels: every coordinate of a box is a multiple of 0.01, which is one token of the vocabulary.
IMAGE_SIZE, PATCH_SIZE = 100, 20


def build_processor() -> LionProcessor:
    texts = scene_texts()
    image_processor = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LionProcessor(image_processor, build_text_tokenizer(texts), build_qformer_tokenizer(texts))


def build_config(processor: LionProcessor, visual_input: str) -> LionConfig:
    width, depth = 128, 4
    return LionConfig(
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        qformer_config={
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "vocab_size": len(processor.qformer_tokenizer),
            "encoder_hidden_size": width,
            "cross_attention_frequency": 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.1,
        },
        aggregator_config={
            "hidden_size": width,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "feature_layers": (depth - 1, depth - 2, depth - 3),
            "projection_size": 256,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.1,
        },
        text_config={
            **FLAN_T5_XL,
            "vocab_size": len(processor.tokenizer),
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "pad_token_id": processor.tokenizer.pad_token_id,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "decoder_start_token_id": processor.tokenizer.pad_token_id,
        },
        visual_input=visual_input,
        num_query_tokens=16,
        adapter_rank=64,
        soft_prompt_token=processor.soft_prompt_token,
        soft_prompt_token_id=processor.soft_prompt_token_id,
        initializer_range=0.1,
    )
