"""Initialisation of the Q-Former from files with the names of LAVIS and of transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lion_fast.conversion.lion import original_name
from lion_fast.io.checkpoints import CheckpointError
from lion_fast.training import RecipeError
from lion_fast.training.building import build_model
from lion_fast.training.qformer import load_qformer
from tests.lion_fast.training.runs import MakeRecipe

PARTS = ("query_tokens", "vision_layernorm", "qformer", "qformer_projection")


@pytest.fixture
def published(make_recipe: MakeRecipe) -> dict[str, Tensor]:
    """State of a Q-Former with other values, under LION's names."""
    model, _ = build_model(make_recipe(1))
    own = {name: value for name, value in model.named_parameters() if name.split(".")[0] in PARTS}
    return {name: torch.randn(value.shape) for name, value in own.items()}


def in_transformers(name: str) -> str:
    """Rename a state to the names of InstructBlipForConditionalGeneration."""
    name = name.replace("vision_layernorm.", "vision_model.post_layernorm.")
    return name.replace("qformer_projection.", "language_projection.")


def test_a_run_starts_from_a_qformer(make_recipe: MakeRecipe, published: dict[str, Tensor], tmp_path: Path) -> None:
    lavis, directory = tmp_path / "blip2.pth", tmp_path / "instructblip"
    extra = {"Qformer.bert.embeddings.position_ids": torch.arange(4), "Qformer.cls.bias": torch.zeros(2)}
    torch.save({"model": {**{original_name(name): value for name, value in published.items()}, **extra}}, lavis)
    assert "Qformer.bert.encoder.layer.0.attention.self.query.weight" in torch.load(lavis)["model"]
    directory.mkdir()
    save_file({in_transformers(name): value for name, value in published.items()}, directory / "model.safetensors")
    for path in (lavis, directory):
        frozen = make_recipe(1).model.carry_over[0]
        model, _ = build_model(
            make_recipe(1, f"model.qformer_from='{path}'", f"model.frozen_from='{frozen}'", "model.carry_over=[]")
        )
        for name, value in published.items():
            assert torch.equal(model.get_parameter(name), value), name
        carried, _ = build_model(make_recipe(1, f"model.qformer_from='{path}'"))
        assert not torch.equal(carried.query_tokens, published["query_tokens"]), "what is carried over lies over it"


def test_an_absent_or_mismatched_projection_is_not_loaded(
    make_recipe: MakeRecipe, published: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "first-stage.pth"
    model, _ = build_model(make_recipe(1))
    before = model.qformer_projection.weight.clone()
    for width in (None, 99):
        state = {original_name(n): v for n, v in published.items() if not n.startswith("qformer_projection.")}
        if width:
            state |= {"t5_proj.weight": torch.zeros(width, before.shape[1]), "t5_proj.bias": torch.zeros(width)}
        torch.save(state, file)
        written = load_qformer(model, file)
        assert len(written) == len(published) - 2
        assert torch.equal(model.qformer_projection.weight, before)


def test_invalid_files_are_rejected(make_recipe: MakeRecipe, published: dict[str, Tensor], tmp_path: Path) -> None:
    model, _ = build_model(make_recipe(1))
    file = tmp_path / "file.pth"
    state = {original_name(name): value for name, value in published.items()}
    torch.save({name: value for name, value in state.items() if ".output.dense.weight" not in name}, file)
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of the Q-Former, such as Qformer.bert.* first stage"):
        load_qformer(model, file)
    torch.save({**state, "query_tokens": torch.zeros(1, 9, 9)}, file)
    with pytest.raises(CheckpointError, match=r"query_tokens: expected \[1, 4, 16\], got \[1, 9, 9\]"):
        load_qformer(model, file)
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="expected a Q-Former, got no tensor query_tokens among 1"):
        load_qformer(model, file)
    region, _ = build_model(make_recipe(2))
    with pytest.raises(ValueError, match="expected one with a Q-Former, got visual_input 'AGGREGATOR'"):
        load_qformer(region, file)
    with pytest.raises(RecipeError, match=r"model.qformer_from: expected null in stage 2, which has no Q-Former"):
        make_recipe(2, f"model.qformer_from={file}").check_sources()
