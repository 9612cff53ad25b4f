"""From a recipe to a trained model: `lion-fast train` and its Python form."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from lion_fast.configuration_lion import LionConfig
from lion_fast.data.loader import start_method
from lion_fast.data.order import TrainingOrder
from lion_fast.data.records import DataError
from lion_fast.data.seeding import seed_everything
from lion_fast.extras import require
from lion_fast.inference.loading import load_complete
from lion_fast.io.atomic import write_text
from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.training import saving
from lion_fast.training.data import TaskSamples, open_evaluation_data, open_training_data
from lion_fast.training.memory import checkpoint_blocks
from lion_fast.training.qformer import load_qformer
from lion_fast.training.recipe import Recipe, RecipeError, check_resumable, dump_recipe
from lion_fast.training.reporting import TensorBoardCurves
from lion_fast.training.stages import carry_over, copy_frozen, freeze_for_stage, stage_of_model
from lion_fast.training.trainer import LionTrainer

RECIPE_FILE = "recipe.yaml"
SCHEDULE = "cosine_warmup_with_min_lr"


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    train_samples: Mapping[str, Dataset] | None = None,
    eval_samples: Mapping[str, Dataset] | None = None,
    data_collator: Any = None,
    callbacks: list[TrainerCallback] | None = None,
) -> LionTrainer:
    """Run one stage; under `torchrun` on all its processes.

    Written to `recipe.output_dir`: `recipe.yaml`, `checkpoint-N/`, `tensorboard/` (where TensorBoard is installed),
    `pictures/` and at the end `model/`, which `LionForCausalLM.from_pretrained` and `LionProcessor.from_pretrained`
    load.

    Args:
        recipe: see `load_recipe`.
        resume: go on from the newest undamaged checkpoint in `output_dir`, or from the start if there is none.
        train_samples: task -> data set (samples as `lion_fast.training.data` describes them), instead of the recipe's.
        eval_samples: the same for evaluation.
        data_collator: instead of `LionCollator`.
        callbacks: of transformers' kind, beside those for TensorBoard.

    Returns:
        The trainer after its last step.

    Raises:
        RecipeError: for settings that do not fit together or, with `resume`, not to the run that began.
        CheckpointError: for a model's directory that cannot be loaded.
        DataError: for a line or picture that cannot be used, unless `data.skip_bad`.
        NonFiniteError: a loss or gradient is NaN or infinite.
        OSError: a file cannot be read or written, as on a full disk; the newest checkpoint is whole.
        MissingExtraError: accelerate is not installed, which transformers' Trainer needs.
    """
    require("train", "accelerate")
    from accelerate.utils import broadcast_object_list

    run_dir = Path(recipe.output_dir)
    if train_samples is None:
        recipe.check_sources()
        train_samples = open_training_data(recipe.data, recipe.seed)
    if eval_samples is None:
        eval_samples = open_evaluation_data(recipe.data)
    arguments = training_arguments(recipe, evaluates=bool(eval_samples))
    checkpoint = [prepare_run(recipe, run_dir, resume) if arguments.process_index == 0 else None]
    broadcast_object_list(checkpoint)
    model, processor = build_model(recipe)
    trainer = LionTrainer(
        model,
        arguments,
        recipe=recipe,
        processor=processor,
        order=training_order(recipe, train_samples),
        eval_samples=dict(eval_samples),
        data_collator=data_collator,
        callbacks=[*(callbacks or []), TensorBoardCurves()],
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint[0])
    except DataError as error:
        # A worker's comes wrapped in its traceback, of which the last line is the error.
        message = str(error).strip().splitlines()[-1]
        raise DataError(message.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from error
    trainer.save_final(run_dir / "model")
    trainer.report_left_out()
    return trainer


def prepare_run(recipe: Recipe, run_dir: Path, resume: bool) -> str | None:
    """Make the run's folder, or see that a run in it can go on; for one process.

    Returns:
        The checkpoint to go on from; None to begin.

    Raises:
        RecipeError: the folder holds checkpoints of a run that is not to be resumed, or of another recipe.
    """
    begun = run_dir / RECIPE_FILE
    if saving.checkpoints(run_dir) and not resume:
        raise RecipeError(
            f"output_dir: expected a folder without checkpoints, got {run_dir}; resume the run, or name another folder"
        )
    if resume and begun.is_file():
        check_resumable(yaml.safe_load(begun.read_text(encoding="utf-8")), recipe.plain())
    run_dir.mkdir(parents=True, exist_ok=True)
    saving.clear_aside(run_dir)
    write_text(begun, dump_recipe(recipe))
    if not resume:
        return None
    checkpoint = saving.last_complete(run_dir)
    print(f"resuming from {checkpoint or 'the start: there is no undamaged checkpoint'}")
    for path in saving.checkpoints(run_dir):
        if path == checkpoint:
            return str(checkpoint)
        saving.remove(path)  # damaged, and its name is that of one to come
    return None


def build_model(recipe: Recipe) -> tuple[LionForCausalLM, LionProcessor]:
    """The stage's model at its start, frozen as the stage asks, and its processor.

    Raises:
        RecipeError: no directory is given, or a model has other dimensions than the first.
        CheckpointError: a directory cannot be loaded.
    """
    settings, stage = recipe.model, recipe.definition
    sources = [*([settings.frozen_from] if settings.frozen_from else []), *settings.carry_over]
    if not sources:
        raise RecipeError("model: expected a directory in model.frozen_from or model.carry_over, got neither")
    for directory in sources:
        if not Path(directory).is_dir():
            raise CheckpointError(f"{directory}: no such directory")
    with naming(sources[0], "a directory with LION's configuration and processor"):
        config = stage_config(LionConfig.from_pretrained(sources[0]), recipe)
        processor = LionProcessor.from_pretrained(sources[0])
    seed_everything(recipe.seed)
    model = LionForCausalLM(config)
    if settings.qformer_from is not None:
        load_qformer(model, settings.qformer_from)
    for place, directory in enumerate(sources):
        source = load_complete(Path(directory), dtype=torch.float32)
        try:
            if place == 0 and settings.frozen_from:
                copy_frozen(source, model)
            else:
                carry_over(source, stage_of_model(source), model, stage)
        except ValueError as error:
            raise RecipeError(f"model: {directory} does not fit {sources[0]}: {error}") from error
        del source
    freeze_for_stage(model, stage)
    if recipe.precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    if recipe.gradient_checkpointing:
        checkpoint_blocks(model)
    return model, processor


def stage_config(config: LionConfig, recipe: Recipe) -> LionConfig:
    """The configuration of the stage's model, its dimensions those of `config`."""
    stage = recipe.definition
    changed = LionConfig.from_dict(
        {
            **config.to_dict(),
            "visual_input": stage.visual_input,
            "num_adapters": None,
            "kernel_backend": recipe.model.kernel_backend,
        }
    )
    if recipe.model.dropout is not None:
        for part in (changed.qformer_config, changed.aggregator_config, changed.text_config):
            for name in ("dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
                if hasattr(part, name):
                    setattr(part, name, recipe.model.dropout)
    return changed


def training_order(recipe: Recipe, samples: Mapping[str, Dataset]) -> TrainingOrder:
    """The keys of all the run's samples.

    Args:
        recipe: its `data.shares` say how often each task has its turn.
        samples: task -> data set with a length.

    Raises:
        RecipeError: `data.group_by_length` with data sets that do not know their lengths; a data set without samples.
    """
    by_task = {
        task: dataset if isinstance(dataset, TaskSamples) else TaskSamples(task, {task: dataset})
        for task, dataset in samples.items()
    }
    try:
        return TrainingOrder(
            by_task,
            [getattr(recipe.data.shares, task) for task in samples],
            steps=recipe.steps,
            batch_size=recipe.batch.size,
            mix=recipe.data.mix,
            shuffle=recipe.data.shuffle,
            group_by_length=recipe.data.group_by_length,
            seed=recipe.seed,
        )
    except ValueError as error:
        raise RecipeError(f"data.{error}") from error


def schedule_rates(recipe: Recipe) -> dict[str, float]:
    """Where warm-up starts and the cosine ends, as shares of the peak, for transformers' `SCHEDULE`."""
    optimizer = recipe.optimizer
    return {"min_lr_rate": optimizer.min_lr / optimizer.lr, "warmup_lr_rate": optimizer.warmup_lr / optimizer.lr}


def training_arguments(recipe: Recipe, evaluates: bool = True) -> TrainingArguments:
    """The recipe as transformers' Trainer takes it, on this machine.

    Raises:
        RecipeError: several GPUs without `torchrun`, sharding where there is nothing to shard with, or a batch that the
            processes cannot share.
    """
    optimizer, on_gpu = recipe.optimizer, torch.cuda.is_available()
    launched = "WORLD_SIZE" in os.environ
    if torch.cuda.device_count() > 1 and not launched:
        raise RecipeError(
            f"expected a process per GPU, got one for {torch.cuda.device_count()}: start it with torchrun "
            "--nproc-per-node N --no-python lion-fast train ..., or name one GPU in CUDA_VISIBLE_DEVICES"
        )
    if recipe.parallel == "fsdp" and not launched:
        raise RecipeError("parallel: expected 'ddp' in a process that torchrun has not started, got 'fsdp'")
    sharded: dict[str, Any] = {}
    if recipe.parallel == "fsdp":
        sharded = {
            "fsdp": True,
            # Nothing is left to wrap: LionTrainer shards the model itself.
            "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "NO_WRAP"},
        }
    return TrainingArguments(
        output_dir=recipe.output_dir,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch.per_process,
        per_device_eval_batch_size=recipe.batch.per_process,
        gradient_accumulation_steps=recipe.batch.accumulation(int(os.environ.get("WORLD_SIZE", "1"))),
        learning_rate=optimizer.lr,
        lr_scheduler_type=SCHEDULE,
        lr_scheduler_kwargs=schedule_rates(recipe),
        warmup_steps=optimizer.warmup_steps,
        max_grad_norm=optimizer.clip,
        bf16=recipe.precision == "bf16",
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # LionTrainer's own watch sees to it
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.evaluation.every,
        save_strategy="steps",
        save_steps=recipe.checkpoints.every,
        dataloader_num_workers=recipe.data.workers,
        dataloader_multiprocessing_context=start_method() if recipe.data.workers else None,
        dataloader_prefetch_factor=recipe.data.prefetch if recipe.data.workers else None,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # the Q-Former's last layer has a branch for text that nothing reads
        use_cpu=not on_gpu,
        report_to="none",
        **sharded,
    )
