"""Helpers: data of a run, its results, and its processes."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from lion_fast.training import saving
from lion_fast.training.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
PATIENCE = 300  # seconds to wait for a process: ends a hang, and is long enough for a busy machine


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


def finish(*processes: Any) -> None:
    for process in processes:
        process.join(timeout=PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(processes)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_on(processes: int, start: Callable[..., Any], recipe: Recipe, **arguments: Any) -> None:
    port = free_port()
    group = [start(recipe, rank=rank, world=processes, port=port, **arguments) for rank in range(processes)]
    finish(*group)
