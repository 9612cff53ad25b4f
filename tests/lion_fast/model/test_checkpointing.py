"""Gradient checkpointing, reentrant or not: every trained parameter gets its gradient, in frozen and unfrozen parts."""

import warnings
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from lion_fast import LionForCausalLM
from tests.extras import needs
from tests.lion_fast.gradients import Results, expect_same, gradients_of
from tests.lion_fast.tiny import Batch, make_batch, make_model

PARTS = ("vision_model", "qformer", "aggregator", "language_model")
# Layers of PEFT in the parts, by the family of the language model.
TARGETS = {"t5": ["qkv", "query", "value", "q", "v"], "llama": ["qkv", "query", "value", "q_proj", "v_proj"]}


def checkpoint(model: Any, **settings: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.17 has only the older name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def results_of(model: Any, batch: dict[str, Any]) -> Results:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # in frozen parts
        warnings.filterwarnings("ignore", message=".*use_reentrant parameter should be passed")
        return gradients_of(model, batch)


def expect_checkpoints_change_nothing(model: Any, batch: dict[str, Any]) -> None:
    expected = results_of(model.train(), batch)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected[1].keys()
    for settings in ({"use_reentrant": True}, {"use_reentrant": False}, {}):
        checkpoint(model, **settings)
        expect_same(results_of(model, batch), expected)


def with_lora(model: LionForCausalLM, targets: list[str]) -> Any:
    peft = needs("peft", "test")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("require_input_gradients", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_lora_in_every_part(family: str, require_input_gradients: bool) -> None:
    model = with_lora(make_model(family), TARGETS[family])
    if require_input_gradients:
        model.enable_input_require_grads()
    assert {part for part in PARTS for name, p in model.named_parameters() if p.requires_grad and part in name} == {
        *PARTS
    }
    expect_checkpoints_change_nothing(model, make_batch(labels=True))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", TARGETS)
def test_lora_in_one_part(family: str, part: str) -> None:
    """Everything before the part is frozen."""
    targets = {"vision_model": ["qkv"], "language_model": TARGETS[family][-2:]}.get(part, ["query", "value"])
    model = with_lora(make_model(family), targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and part in name)
    expect_checkpoints_change_nothing(model, make_batch(labels=True))


@pytest.mark.parametrize("trained", ["vision_model.blocks", "aggregator.", "qformer.encoder", ".decoder.block", ""])
def test_unfrozen_parts_without_lora(trained: str) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    expect_checkpoints_change_nothing(model, make_batch(labels=True))


@pytest.mark.parametrize("family", TARGETS)
def test_precomputed_features(family: str) -> None:
    """Features of the frozen tower leave it out; features with gradients train the tower and the aggregator."""
    model = with_lora(make_model(family), TARGETS[family])
    base = model.base_model.model
    batch: Batch = make_batch(labels=True)
    pixels = batch.pop("pixel_values")
    with torch.no_grad():
        features = base.get_vision_features(pixels)
    for name, parameter in model.named_parameters():
        if "vision_model" in name:
            parameter.requires_grad_(False)
    expect_checkpoints_change_nothing(model, {**batch, "vision_features": features})
    assert not features.requires_grad
    model = with_lora(make_model(family), TARGETS[family]).train()
    checkpoint(model, use_reentrant=True)
    model(**batch, image_features=model.base_model.model.encode_images(pixels)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("bits", [8, 4])
def test_preparation_for_training_in_fewer_bits(tmp_path: Any, bits: int) -> None:
    """PEFT's preparation checkpoints reentrantly by default."""
    needs("bitsandbytes", "quantize")
    peft = needs("peft", "test")
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
    text = {"d_model": 64, "d_ff": 128, "d_kv": 16}
    make_model(text=text, vision_config=wide, aggregator_config={"hidden_size": 64}).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    model = LionForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.prepare_model_for_kbit_training(model)
    model = with_lora(model, TARGETS["t5"]).train()
    model(**make_batch(labels=True)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
