"""Reading the original's files: missing keys, unused keys, and models with one visual input."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lion_reference import LION, generate
from tests.rounding import expect_within, relative_error

QFORMER_KEYS = ("Qformer.", "query_tokens", "ln_vision.", "t5_proj.")
AGGREGATOR_KEYS = ("fusion_adapter.", "ln_adapter.", "adapter_proj.")


@pytest.fixture(scope="module")
def lion_state(golden_files) -> dict[str, Tensor]:
    return torch.load(golden_files["lion"], weights_only=True)["model"]


def load(golden_files: dict, path: Path, name: str, state: dict) -> LION:
    """Load the model with one of its files replaced by `state`."""
    torch.save(state, path / "changed.pth")
    return LION.from_checkpoint_files(**{**golden_files, name: path / "changed.pth"})


def single_adapter(state: dict[str, Tensor], visual_input: str) -> dict[str, Tensor]:
    """Return a first- or second-stage checkpoint: one visual input, and the adapter of each pair that it trained."""
    dropped, kept = (AGGREGATOR_KEYS, 1) if visual_input == "QFORMER" else (QFORMER_KEYS, 0)
    return {
        name.replace(f"adapters.{kept}.", "adapters.0."): tensor
        for name, tensor in state.items()
        if not name.startswith(dropped) and "router" not in name and f"adapters.{1 - kept}." not in name
    }


@pytest.fixture(params=["QFORMER", "AGGREGATOR"])
def variant(request, golden_files, lion_state, tmp_path) -> LION:
    return load(
        golden_files, tmp_path, "lion", {"model": single_adapter(lion_state, request.param), "optimizer": {"step": 3}}
    )


@pytest.fixture
def variant_inputs(variant, inputs) -> dict[str, Tensor]:
    if variant.config.has_qformer:
        return inputs
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("qformer")}


def test_all_tensors_are_loaded(model, golden_files, lion_state):
    state = model.state_dict()
    for name, tensor in torch.load(golden_files["vit"], weights_only=True).items():
        assert torch.equal(state[f"visual_encoder.{name}"], tensor.float()), name
    for name, tensor in load_file(golden_files["llm"] / "model.safetensors").items():
        assert torch.equal(state[f"t5_model.{name}"], tensor.bfloat16().float()), name
    for name, tensor in lion_state.items():
        assert torch.equal(state[name], tensor), name


def test_t5_may_be_sharded(model, golden_files, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(golden_files["llm"] / name, tmp_path)
    tensors = sorted(load_file(golden_files["llm"] / "model.safetensors").items())
    for n, part in enumerate((dict(tensors[:20]), dict(tensors[20:]))):
        halves = {name: tensor.bfloat16() for name, tensor in part.items()}
        save_file(halves, tmp_path / f"model-0000{n + 1}-of-00002.safetensors", metadata={"format": "pt"})
    sharded = LION.from_checkpoint_files(**{**golden_files, "llm": tmp_path}).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(sharded[name], tensor), name


def test_a_variant_has_its_part_of_the_prefix(variant, variant_inputs, expected):
    output = variant(**variant_inputs, labels=expected["image_level.labels"])
    queries, patches = expected["visual_prefix"].split([8, 17], dim=1)
    name, wanted = ("prefix", queries) if variant.config.has_qformer else ("projected", patches)
    expect_within(name, relative_error(output.visual_prefix, wanted))
    output.loss.backward()
    for name, parameter in variant.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_a_variant_equals_the_whole_model_with_initial_routers(variant, model, expected):
    """Initial routers select each task's own adapter: 1 at the image level, 0 at the region level."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "router_ratio" in name:
            parameter.data[0], parameter.data[1] = (1, 0) if name.endswith("1") else (0, 1)
    task, task_id = ("image_level", 1) if variant.config.has_qformer else ("region_level", 0)
    embeds, mask = expected[f"{task}.inputs_embeds"], expected[f"{task}.attention_mask"]
    torch.testing.assert_close(
        variant.t5_model.encode(embeds, mask, None), model.t5_model.encode(embeds, mask, torch.full((4,), task_id))
    )


def test_a_variant_generates(variant, variant_inputs):
    ids = generate(variant, **variant_inputs, num_beams=2, max_new_tokens=4)
    assert ids.shape[0] == 4
    assert 2 <= ids.shape[1] <= 5
    assert (ids[:, 0] == variant.config.t5.decoder_start_token_id).all()


def test_missing_keys_are_named(golden_files, lion_state, tmp_path):
    name = "fusion_adapter.blocks.1.output.dense.bias"
    with pytest.raises(ValueError, match=f"missing keys \\['{name}'\\]"):
        load(golden_files, tmp_path, "lion", {key: tensor for key, tensor in lion_state.items() if key != name})
    with pytest.raises(ValueError, match="missing key 'query_tokens'"):
        load(
            golden_files, tmp_path, "lion", {key: tensor for key, tensor in lion_state.items() if key != "query_tokens"}
        )
    with pytest.raises(ValueError, match=r"expected keys Qformer\.\* or fusion_adapter\.\* or both, got neither"):
        load(golden_files, tmp_path, "lion", {"soft_prompt_hint": lion_state["soft_prompt_hint"]})


def test_unused_keys_are_ignored_and_listed(golden_files, tmp_path):
    state = torch.load(golden_files["vit"], weights_only=True)
    state["blocks.39.norm1.weight"] = torch.ones(176)
    with pytest.warns(UserWarning, match=r"ignored keys \['visual_encoder.blocks.39.norm1.weight'\]"):
        load(golden_files, tmp_path, "vit", state)


def test_another_image_size(golden_files, inputs, expected):
    model = LION.from_checkpoint_files(**golden_files, image_size=70)
    pixel_values = torch.nn.functional.interpolate(inputs["pixel_values"], size=70, mode="bicubic")
    output = model(
        **{**inputs, "pixel_values": pixel_values},
        task_ids=torch.zeros(4, dtype=torch.long),
        labels=expected["image_level.labels"],
    )
    assert output.visual_prefix.shape[1] == 8 + 1 + 5 * 5
    assert output.loss.isfinite()
