"""Fixtures: a tiny model, its recipes and training data, and training processes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_fast import LionForCausalLM
from lion_fast.data import JsonlDataset, write_shards
from lion_fast.scenes import write_scenes
from tests.lion_fast.processes import starting
from tests.lion_fast.tiny import NO_DROPOUT, make_config, make_tagger, scene_processor
from tests.lion_fast.training.runs import Files, MakeRecipe, recipe_maker

PROCESS = Path(__file__).with_name("training_process.py")


@pytest.fixture(scope="session")
def tiny_lion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a joint model of a few thousand parameters for scenes, with dropout."""
    processor = scene_processor(20)
    dropout = dict.fromkeys(NO_DROPOUT, 0.1)
    config = make_config(
        processor=processor,
        qformer_config={**dropout, "max_position_embeddings": 512},
        aggregator_config={**dropout, "num_attention_heads": 2, "projection_size": 24},
        text={"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.1},
        adapter_rank=4,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny") / "lion"
    LionForCausalLM(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def make_recipe(tiny_lion: Path, tmp_path: Path) -> MakeRecipe:
    """Factory of recipes with the tiny model, scenes, and a few small steps."""

    return recipe_maker(tmp_path, tiny_lion)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("files")
    jsonl = write_scenes(directory / "scenes", 6, seed=3, image_size=32)
    write_shards(JsonlDataset(jsonl), directory / "shards", shard_bytes=20_000)
    return Files(jsonl, directory / "shards")


@pytest.fixture(scope="session")
def tagger_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tagger of a few thousand parameters that always gives every tag."""
    directory = tmp_path_factory.mktemp("tagger") / "ram"
    make_tagger(["red", "blue"], [0.0, 0.0]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Any]]:
    """Start a `training_process`."""
    with starting(PROCESS, ["lion_fast.training.run", "lion_fast.training.fsdp2", "torch.utils.tensorboard"]) as begin:
        yield lambda recipe, **arguments: begin(recipe=recipe.plain(), **arguments)
