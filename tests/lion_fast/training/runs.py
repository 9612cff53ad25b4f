"""Helpers: data of a run, its results, and runs on several processes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from lion_fast.training import load_recipe, saving
from lion_fast.training.recipe import Recipe
from tests.lion_fast.processes import PATIENCE, finish, free_port

MakeRecipe = Callable[..., Recipe]


class Files(NamedTuple):
    """Scenes as a file of JSON lines and as shards."""

    jsonl: Path
    shards: Path

    def overrides(self) -> tuple[str, ...]:
        """Return overrides that train on both, one per task, grouped by length."""
        return (
            f"data.train.image_level=['{self.jsonl}']",
            f"data.train.region_level=['{self.shards}']",
            "data.group_by_length=true",
        )


def recipe_maker(directory: Path, model: Path) -> MakeRecipe:
    """Return a factory of recipes of runs in a directory, with a small model, scenes, and a few small steps."""

    def make(stage: int = 3, *overrides: str, name: str = "run") -> Recipe:
        trained = {1: ["image_level"], 2: ["region_level"]}.get(stage, ["image_level", "region_level"])
        settings = [
            f"output_dir={directory / name}",
            f"model.carry_over=['{model}']",
            *(f"data.train.{task}=['scenes:0:7']" for task in trained),
            "data.mix=sample",
            "data.workers=0",
            "optimizer.lr=1e-3",
            "optimizer.warmup_steps=2",
            "batch.size=4",
            "batch.per_process=2",
            "steps=6",
            "precision=fp32",
            "log_every=1",
            "checkpoints.every=2",
            "evaluation.max_new_tokens=4",
        ]
        return load_recipe(stage, overrides=[*settings, *overrides])

    return make


def losses_of(run_dir: Path | str, name: str = "loss") -> list[float]:
    history = json.loads((saving.checkpoints(Path(run_dir))[0] / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def weights_of(run_dir: Path | str) -> dict[str, Tensor]:
    return load_file(Path(run_dir) / "model" / "model.safetensors")


def run_on(processes: int, start: Callable[..., Any], recipe: Recipe, **arguments: Any) -> None:
    port = free_port()
    group = [start(recipe, rank=rank, world=processes, port=port, **arguments) for rank in range(processes)]
    finish(*group)


def wait_for(file: Path, process: Any) -> None:
    """Wait until `process` has created `file`, or has ended."""
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert process.is_alive(), "the process has ended by itself"
        assert time.monotonic() < deadline, f"no {file.name} after {PATIENCE} seconds"
        time.sleep(0.001)
