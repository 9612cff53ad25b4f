"""Helpers: data of a run, its results, and runs on several processes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from lion_fast.training import saving
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
