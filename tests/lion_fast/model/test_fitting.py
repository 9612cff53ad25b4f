"""Configurations that do not fit their weights: refused by key and numbers, before anything is allocated."""

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lion_fast import LionConfig, LionForCausalLM, RamTagger
from lion_fast.io.checkpoints import CheckpointError
from tests.lion_fast.tiny import FAMILIES, make_config, make_model, make_tagger


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for family in FAMILIES:
        make_model(family).save_pretrained(root / family)
    make_tagger(["dog", "cat"], [0.5, 0.5]).save_pretrained(root / "ram")
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path):
    return lambda kind: Path(shutil.copytree(saved / kind, tmp_path / kind))


def change(folder: Path, key: str, value: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    part = settings
    *above, last = key.split(".")
    for name in above:
        part = part[name]
    part[last] = value
    (folder / "config.json").write_text(json.dumps(settings))


DECODER = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
KEYS = {
    "t5": [
        "num_query_tokens",
        "adapter_rank",
        *(f"vision_config.{name}" for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size")),
        *(f"vision_config.{name}" for name in ("patch_size", "num_channels")),
        *(f"qformer_config.{name}" for name in ("vocab_size", "num_hidden_layers", "intermediate_size")),
        *(f"qformer_config.{name}" for name in ("hidden_size", "max_position_embeddings")),
        *(f"aggregator_config.{name}" for name in ("intermediate_size", "projection_size")),
        *(f"text_config.{name}" for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")),
        *(f"text_config.{name}" for name in ("num_decoder_layers", "relative_attention_num_buckets")),
    ],
    "llama": [f"text_config.{name}" for name in DECODER],
    "qwen2": [f"text_config.{name}" for name in (*DECODER, "num_key_value_heads")],
    "qwen3": [f"text_config.{name}" for name in (*DECODER, "head_dim")],
    "ram": [
        *("num_tags", "label_size", "projection_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
        *(f"vision_config.{name}" for name in ("embed_dim", "window_size", "patch_size", "mlp_ratio")),
    ],
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys])
def test_giant_and_other_sizes_are_refused_by_key_at_once(copy, kind: str, key: str) -> None:
    folder = copy(kind)
    load = (RamTagger if kind == "ram" else LionForCausalLM).from_pretrained
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    for value in (10**9, 3000, 840, 1):
        change(folder, key, value)
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        message = str(caught.value)
        assert str(folder) in message
        assert "config.json" in message
        assert "\n" not in message
        # Where sizes depend on each other, the first that does not fit is named.
        names = (key.rsplit(".", 1)[-1], "hidden_size", "hidden size", "image_size")
        assert any(name in message for name in names), message
    assert time.process_time() - start < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_the_message_has_both_numbers(copy) -> None:
    folder = copy("t5")
    change(folder, "text_config.vocab_size", 10_000_000)
    message = "config.json: text_config.vocab_size: expected 64, as in the weights, got 10000000"
    with pytest.raises(CheckpointError, match=message):
        LionForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"text_config\.num_layers: expected at most 1024, got 1000000000"):
        make_config("t5", text={"num_layers": 10**9})


@pytest.mark.parametrize(
    ("part", "key", "value", "expected"),
    [
        ("vision_config", "hidden_size", -16, "1 or more"),
        ("vision_config", "num_hidden_layers", 2.0, "a whole number"),
        ("vision_config", "layer_norm_eps", float("nan"), "a finite number"),
        ("qformer_config", "vocab_size", "64", "a whole number"),
        ("qformer_config", "num_hidden_layers", True, "a whole number"),
        ("qformer_config", "hidden_act", "evil", "the name of an activation"),
        ("aggregator_config", "feature_layers", 3, "a list of whole numbers in 0..1024"),
        ("aggregator_config", "feature_layers", [0.5], "a list of whole numbers in 0..1024"),
        ("aggregator_config", "hidden_dropout_prob", 2, "at most 1"),
        ("text_config", "d_model", None, "a number"),
        ("text_config", "tie_word_embeddings", "yes", "true or false"),
        ("text_config", "from_dict", {}, "no setting of this name"),
        ("text_config", "model_type", "evil", "a model type of transformers"),
        ("text_config", "model_type", "gpt2", "one of 't5', 'llama', 'qwen2', 'qwen3'"),
        ("text_config", "model_type", "lion", "one of 't5', 'llama', 'qwen2', 'qwen3'"),
        ("text_config", "pad_token_id", 64, r"an id below 64 \(text_config.vocab_size\)"),
        ("text_config", "per_layer_config", {"0": {"d_ff": 10**9}}, "none, because"),
        ("text_config", "id2label", {"a": "b"}, "an object with whole numbers as keys"),
        ("text_config", "rope_parameters", {"rope_type": "evil"}, "one of default, "),
        ("qformer_config", "num_attention_heads", 3, "a divisor of hidden_size 16"),
        ("qformer_config", "pad_token_id", 64, r"an id below 64 \(qformer_config.vocab_size\)"),
        ("vision_config", "model_type", "clip", "'lion_vision'"),
    ],
)
def test_types_and_ranges_of_a_new_configuration(part: str, key: str, value: object, expected: str) -> None:
    settings = make_config("t5").to_dict()
    settings[part][key] = value
    with pytest.raises(ValueError, match=rf"{part}\.{key}[a-z_.]*: expected {expected}.*, got"):
        LionConfig(**settings)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("share_settings", 1, "no setting of this name"),
        ("has_router", True, "no setting of this name"),
        ("fusion_config", {"patch_embeddings": True}, "none, because"),
    ],
)
def test_a_new_configuration_sets_no_method_and_no_other_layers(key: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected {expected}.*, got"):
        LionConfig(**make_config("t5").to_dict(), **{key: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_input": "BOTH"}, "visual_input: expected one of 'ALL', 'QFORMER', 'AGGREGATOR', got 'BOTH'"),
        ({"num_adapters": 7}, "num_adapters: expected 1 or 2, got 7"),
        ({"num_adapters": "2"}, "num_adapters: expected a whole number, got '2'"),
        ({"kernel_backend": "cuda"}, "kernel_backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
        ({"soft_prompt_token_id": "x"}, "soft_prompt_token_id: expected a token's id, got 'x'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder: expected True for text_config.model_type 't5', got False"),
        ({"text_config": 3}, "text_config: expected a PreTrainedConfig, got 3"),
        ({"vision_config": None}, "vision_config: expected a LionVisionConfig, got None"),
        ({"text_config": {"vocab_size": 70}}, "text_config.vocab_size: expected 64, as in the weights, got 70"),
        ({"config": {}}, "config: expected a LionConfig or the path of one, got {}"),
        (
            {"quantization_config": 3},
            "quantization_config: expected a configuration of transformers or its dict",
        ),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config: expected the settings of a quantizer"),
        ({"dtype": "int8"}, "with dtype='int8' "),
        ({"device_map": "nowhere"}, "with device_map='nowhere' "),
        ({"hidden_size": 70}, "hidden_size: unexpected argument of from_pretrained"),
    ],
)
def test_an_argument_of_loading_is_named(copy, settings: dict[str, Any], message: str) -> None:
    folder = copy("t5")
    with pytest.raises((ValueError, TypeError), match=message):
        LionForCausalLM.from_pretrained(folder, **settings)


def test_settings_of_a_part_may_be_replaced(copy) -> None:
    folder = copy("t5")
    model = LionForCausalLM.from_pretrained(folder, text_config={"dropout_rate": 0.5})
    assert model.config.text_config.dropout_rate == 0.5
    assert model.config.text_config.d_model == 32


def test_a_changed_configuration_is_checked_again() -> None:
    config = make_config("t5")
    config.num_adapters = 7
    with pytest.raises(ValueError, match="num_adapters: expected 1 or 2, got 7"):
        LionForCausalLM(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "not a configuration of generation that can be used"),
        ({"validate": 1}, "validate: expected no setting of this name"),
    ],
)
def test_settings_of_generation_are_named(copy, settings: dict[str, Any], message: str) -> None:
    folder = copy("t5")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=f"{file}: {message}"):
        LionForCausalLM.from_pretrained(folder)


def test_weights_of_a_wrapped_model_are_named(copy) -> None:
    """As `DistributedDataParallel` and PEFT name them."""
    folder = copy("t5")
    tensors = {f"module.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor (\S+), but has module\.\1: save the model without"):
        LionForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("change_of", ["missing", "dtype", "another visual input", "one adapter", "no heads"])
def test_incomplete_weights_are_refused(copy, change_of: str) -> None:
    """transformers would fill them with random values, with a warning."""
    folder = copy("t5")
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.encoder.block.1.layer.0.layer_norm.weight"
    message = f"{folder}: 1 tensors are missing or of another shape, such as {name}"
    if change_of == "missing":
        del tensors[name]
    elif change_of == "dtype":
        tensors[name] = torch.zeros(32, dtype=torch.int64)
        message = f"model.safetensors: {name}: expected floating-point numbers, got torch.int64"
    elif change_of == "another visual input":
        tensors = {key: value for key, value in tensors.items() if not key.startswith("aggregator")}
        message = r"config\.json: visual_input: expected QFORMER, as in the weights, got ALL"
    elif change_of == "one adapter":
        tensors = {key: value for key, value in tensors.items() if ".adapters.1." not in key}
        message = r"config\.json: num_adapters: expected 1, as in the weights, got 2"
    else:
        tensors["query_tokens"] = torch.zeros(4)
        message = "query_tokens: expected 2 dimensions or more, got \\[4\\]"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        LionForCausalLM.from_pretrained(folder)


def test_who_asks_for_another_model_gets_new_weights(copy) -> None:
    folder = copy("t5")
    assert LionForCausalLM.from_pretrained(folder, visual_input="QFORMER").config.visual_input == "QFORMER"
    with pytest.raises(CheckpointError, match="num_query_tokens: expected 4, as in the weights, got 8"):
        LionForCausalLM.from_pretrained(folder, num_query_tokens=8)
    model = LionForCausalLM.from_pretrained(folder, num_query_tokens=8, ignore_mismatched_sizes=True)
    assert model.query_tokens.shape[1] == 8
