"""One process of a training run, for tests that kill it or run several processes.

`runpy.run_path` runs this file in a process forked from a server that has imported everything; `ARGUMENTS` are the
arguments of `main`.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def main(
    recipe: dict[str, Any],
    *,
    engine: str = "trainer",
    resume: bool = False,
    rank: int | None = None,
    world: int = 1,
    port: int = 0,
    kill_at: int | None = None,
    hold_at: int | None = None,
    said_at: tuple[int, str] | None = None,
    count_to: str | None = None,
    file_limit: int | None = None,
    stop_after: int | None = None,
    error_to: str | None = None,
) -> None:
    """Train with a recipe given as plain data.

    Args:
        engine: `trainer` or `fsdp2`.
        rank, world, port: rank, size and port of the process group; no group if `rank` is None.
        kill_at: number of the file operation at whose start this process gets SIGKILL.
        said_at: number of a file operation, and the file to create at its start.
        hold_at: number of the file operation at whose start this process waits to be killed, so that it cannot end.
        count_to: file for the number of file operations.
        file_limit: maximum size of a file in bytes, to simulate a full disk.
        stop_after: step after whose checkpoint the run ends, with `fsdp2`.
        error_to: file for the message of the exception that ended the run.
    """
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    from lion_fast.training.recipe import Recipe

    actions: dict[int, Callable[[], object]] = {}
    if kill_at is not None:
        actions[kill_at] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if said_at is not None:
        actions[said_at[0]] = Path(said_at[1]).touch
    if hold_at is not None:
        actions[hold_at] = signal.pause
    operations = watch_files(Path(recipe["output_dir"]), actions)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    parsed = Recipe.read(recipe)
    try:
        if engine == "fsdp2":
            import torch.distributed as dist

            from lion_fast.training import fsdp2

            whole_save = fsdp2.save

            def save(directory: Path, *rest: Any) -> None:
                whole_save(directory, *rest)
                if directory.name == f"checkpoint-{stop_after}" and stop_after != parsed.steps:
                    dist.destroy_process_group()
                    raise SystemExit(0)

            fsdp2.save = save
            dist.init_process_group("gloo")
            fsdp2.train(parsed, resume=resume)
            dist.destroy_process_group()
        else:
            from lion_fast.training.run import train as train_with_trainer

            train_with_trainer(parsed, resume=resume)
    except Exception as error:
        if error_to is not None:
            Path(error_to).write_text(f"{type(error).__name__}: {error}")
        raise
    if count_to is not None:
        Path(count_to).write_text(str(operations[0]))


def watch_files(run_dir: Path, actions: Mapping[int, Callable[[], object]]) -> list[int]:
    """Count operations on files below `run_dir`: open, rename, remove, and creation of directories.

    Args:
        actions: number of an operation, counted from 1 -> function to call at its start.
    """
    operations = [0]
    names = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}

    def hook(event: str, arguments: tuple) -> None:
        if event in names and isinstance(arguments[0], str | os.PathLike) and str(run_dir) in str(arguments[0]):
            operations[0] += 1
            if action := actions.get(operations[0]):
                action()

    sys.addaudithook(hook)
    return operations


if __name__ == "__main__":
    main(**globals()["ARGUMENTS"])
