"""The same training as a plain loop: FSDP2's `fully_shard`, `torch.distributed.checkpoint`, no Trainer.

    torchrun --nproc-per-node 2 -m lion_fast.training.fsdp2 --stage 3 --config stage3.yaml

The loop runs on GPUs (NCCL) and CPUs (gloo). Checkpoints hold the trained parameters in shards and load on any number
of processes: a run of two processes resumes on one with the same loss curve. Use this file to see everything that a
stage needs, or to train LION in your own loop.
"""

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import get_scheduler

from lion_fast.data import make_loader
from lion_fast.data.loader import errors_of_workers
from lion_fast.data.order import POSITION
from lion_fast.data.seeding import seed_everything
from lion_fast.io.checkpoints import naming
from lion_fast.io.paths import path
from lion_fast.model.padding import IGNORED
from lion_fast.processing_lion import LionProcessor
from lion_fast.training import saving
from lion_fast.training.building import build_model, build_optimizer
from lion_fast.training.data import SAMPLE_IDS, LionCollator, hold_to, open_training_data, training_order
from lion_fast.training.definitions import STAGE_NUMBERS
from lion_fast.training.options import add_resuming
from lion_fast.training.recipe import Recipe, load_recipe
from lion_fast.training.run import SCHEDULE, schedule_rates
from lion_fast.training.run_folder import MODEL, begin_run, on_first_process, owned_run
from lion_fast.training.sharding import gathered_state, shard
from lion_fast.training.stages import trained_parameters


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changed_data: bool = False,
    train_samples: Mapping[str, Dataset] | None = None,
) -> tuple[nn.Module, list[float]]:
    """Run one stage on all processes of the default group of `torch.distributed`.

    Args:
        recipe: see `load_recipe`; its evaluation is not run.
        resume: resume from the newest undamaged checkpoint, written by any number of processes.
        allow_changed_data: resume also if files that the run is trained on have changed since its start.
        train_samples: task -> dataset, instead of the recipe's data.

    Returns:
        The sharded model, and the loss of each step from the start of the run.

    Raises:
        RecipeError, CheckpointError, OSError: as for `lion_fast.training.train`.
        ValueError: a loss or gradient is NaN or infinite.
    """
    if train_samples is None:
        recipe.check_sources()
    first = dist.get_rank() == 0
    with ExitStack() as stack:
        owned = owned_run(
            recipe, resume=resume, reads_sources=train_samples is None, allow_changed_data=allow_changed_data
        )
        start = on_first_process(first, dist.broadcast_object_list, lambda: stack.enter_context(owned))
        if train_samples is None:
            train_samples = open_training_data(recipe.data, recipe.seed)
        on_first_process(first, dist.broadcast_object_list, lambda: begin_run(recipe, start))
        return _train_from(start.checkpoint, recipe, train_samples)


def _train_from(
    checkpoint: Path | None, recipe: Recipe, train_samples: Mapping[str, Dataset]
) -> tuple[nn.Module, list[float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    run_dir = Path(recipe.output_dir)
    whole, processor = build_model(recipe)
    hold_to(processor, train_samples)
    whole.to(device)  # type: ignore[arg-type]
    model: Any = shard(whole, recipe.precision)
    model.train()
    settings = recipe.optimizer
    optimizer = build_optimizer(model, settings)
    schedule = get_scheduler(
        SCHEDULE,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=recipe.steps,
        scheduler_specific_kwargs=schedule_rates(recipe),
    )
    step, losses = (0, []) if checkpoint is None else load(checkpoint, model, optimizer, schedule)

    accumulation = recipe.batch.accumulation(world)
    loader = make_loader(
        training_order(recipe, train_samples),
        LionCollator(processor),
        batch_size=recipe.batch.per_process,
        rank=rank,
        world_size=world,
        start=step,
        num_workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        reduce=processor.resize,
    )
    batches = iter(loader)
    while step < recipe.steps:
        with errors_of_workers():
            micro_batches = [next(batches) for _ in range(accumulation)]
        lr = schedule.get_last_lr()[0]
        loss = take_step(model, optimizer, micro_batches, recipe, device)
        schedule.step()
        step += 1
        losses.append(loss)
        if rank == 0 and step % recipe.log_every == 0:
            print(f"step {step}/{recipe.steps}  loss {loss:.4f}  lr {lr:.2e}", flush=True)
        if step % recipe.checkpoints.every == 0 or step == recipe.steps:
            save(run_dir / f"checkpoint-{step}", model, optimizer, schedule, step, losses)
            if rank == 0:
                saving.keep_newest(run_dir, recipe.checkpoints.keep)
    save_whole(run_dir / MODEL, model, processor)
    return model, losses


def take_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict[str, Any]],
    recipe: Recipe,
    device: torch.device,
) -> float:
    """Take one optimizer step over the global batch and return its mean loss per target token.

    Raises:
        ValueError: the loss or a gradient is NaN or infinite; the message names the samples of this process.
    """
    world = dist.get_world_size()
    sample_ids = [identity for batch in micro_batches for identity in batch.pop(SAMPLE_IDS)]
    tokens = torch.tensor(sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches), device=device)
    dist.all_reduce(tokens)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches):
        seed_everything(recipe.seed, batch.pop(POSITION), 1)
        model.set_requires_gradient_sync(number == len(micro_batches) - 1)
        # FSDP averages gradients over processes; multiplying by `world` gives the sum over all tokens.
        on_device = {name: value.to(device) for name, value in batch.items()}
        loss = model(**on_device, num_items_in_batch=tokens).loss
        (loss * world).backward()
        total += loss.detach()
    dist.all_reduce(total)
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or float("inf"))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = bool((total + norm).isfinite())
    if not finite and recipe.on_nonfinite == "stop":
        raise ValueError(f"loss {total.item()} or gradient norm {norm.item()} not finite, samples {sample_ids}")
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return total.item()


def save(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    step: int,
    losses: list[float],
) -> None:
    """Write a checkpoint; each process writes its shards.

    Raises:
        OSError: the checkpoint cannot be written.
    """
    with saving.written_aside(directory, first=dist.get_rank() == 0, wait_for_all=dist.barrier) as aside:
        save_shards(_state(model, optimizer), checkpoint_id=str(aside / "shards"))
        if dist.get_rank() == 0:
            progress = {"step": step, "losses": losses, "schedule": schedule.state_dict()}
            (aside / "progress.json").write_text(json.dumps(progress), encoding="utf-8")


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> tuple[int, list[float]]:
    """Load a checkpoint written by any number of processes; return its step and the losses up to that step.

    Raises:
        CheckpointError: it cannot be loaded into this model, for example because another loop wrote it.
    """
    with naming(directory, "a checkpoint that this loop can resume from"):
        return _load(directory, model, optimizer, schedule)


def _load(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any
) -> tuple[int, list[float]]:
    shards = str(directory / "shards")
    written = FileSystemReader(shards).read_metadata().state_dict_metadata
    for name, parameter in trained_parameters(model):
        # A parameter without a gradient so far has no optimizer state, neither in the checkpoint nor here.
        if f"optimizer.{name}.step" in written:
            empty = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": torch.zeros(()), **empty}
    with torch.no_grad():
        load_shards(_state(model, optimizer), checkpoint_id=shards)
    progress = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
    schedule.load_state_dict(progress["schedule"])
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    return progress["step"], progress["losses"]


def save_whole(directory: Path, model: Any, processor: LionProcessor) -> None:
    """Gather all parameters and write a directory for `from_pretrained`."""
    state = gathered_state(model)
    with saving.written_aside(directory, first=dist.get_rank() == 0, wait_for_all=dist.barrier) as aside:
        if dist.get_rank() == 0:
            model.save_pretrained(aside, state_dict=state)
            processor.save_pretrained(aside)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the content of a checkpoint by name: the trained parameters and their AdamW state."""
    state = {f"model.{name}": parameter.data for name, parameter in trained_parameters(model)}
    for name, parameter in trained_parameters(model):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one of LION's stages with FSDP2; start with torchrun.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--stage", type=int, required=True, choices=STAGE_NUMBERS)
    parser.add_argument("--config", type=path, metavar="YAML")
    add_resuming(parser)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        train(
            load_recipe(args.stage, args.config, args.overrides),
            resume=args.resume,
            allow_changed_data=args.allow_changed_data,
        )
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
