"""Training of one stage from a recipe: `lion-fast train` and its Python function."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import ProgressCallback, TrainerCallback, TrainingArguments

from lion_fast.data.loader import errors_of_workers, start_method
from lion_fast.extras import require
from lion_fast.training.building import build_model
from lion_fast.training.data import hold_to, open_evaluation_data, open_training_data, training_order
from lion_fast.training.recipe import Recipe, RecipeError
from lion_fast.training.reporting import TensorBoardCurves
from lion_fast.training.run_folder import MODEL, begin_run, on_first_process, owned_run
from lion_fast.training.trainer import LionTrainer, expect_resumable

SCHEDULE = "cosine_warmup_with_min_lr"


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changed_data: bool = False,
    train_samples: Mapping[str, Dataset] | None = None,
    eval_samples: Mapping[str, Dataset] | None = None,
    data_collator: Any = None,
    callbacks: list[TrainerCallback] | None = None,
) -> LionTrainer:
    """Run one stage, on all processes of `torchrun`.

    The run writes to `recipe.output_dir`: `recipe.yaml`, `trained_on.json`, `checkpoint-N/`, `tensorboard/` (if
    TensorBoard is installed), `pictures/` and at the end `model/`, which `LionForCausalLM.from_pretrained` and
    `LionProcessor.from_pretrained` load. One run at a time owns the directory.

    Args:
        recipe: see `load_recipe`.
        resume: resume from the newest undamaged checkpoint in `output_dir`, or start anew if there is none.
        allow_changed_data: resume also if files that the run is trained on have changed since its start.
        train_samples: task -> dataset (`lion_fast.training.data` describes the samples), instead of the recipe's data.
        eval_samples: the same for evaluation.
        data_collator: collator to use instead of `LionCollator`.
        callbacks: callbacks of transformers, in addition to TensorBoard's.

    Returns:
        The trainer after its last step.

    Raises:
        RecipeError: settings contradict each other or, with `resume`, the settings or the data that the run started
            with; `output_dir` holds another run, or files that no run wrote.
        OutputInUseError: another run is using `output_dir`.
        CheckpointError: a model's directory cannot be loaded.
        DataError: a line is invalid or an image unreadable, unless `data.skip_bad`.
        NonFiniteError: a loss or gradient is NaN or infinite.
        OSError: a file cannot be read or written, as on a full disk; the newest checkpoint stays complete.
        MissingExtraError: accelerate is not installed, which transformers' Trainer needs.
    """
    require("train", "accelerate")
    from accelerate.utils import broadcast_object_list

    if train_samples is None:
        recipe.check_sources()
    evaluates = any(vars(recipe.data.evaluate).values()) if eval_samples is None else bool(eval_samples)
    arguments = training_arguments(recipe, evaluates)
    first = arguments.process_index == 0
    with ExitStack() as stack:
        owned = owned_run(
            recipe, resume=resume, reads_sources=train_samples is None, allow_changed_data=allow_changed_data
        )
        start = on_first_process(first, broadcast_object_list, lambda: stack.enter_context(owned))
        if train_samples is None:
            train_samples = open_training_data(recipe.data, recipe.seed)
        if eval_samples is None:
            eval_samples = open_evaluation_data(recipe.data)
        if start.checkpoint is not None:
            expect_resumable(start.checkpoint)
        on_first_process(first, broadcast_object_list, lambda: begin_run(recipe, start))
        model, processor = build_model(recipe)
        hold_to(processor, train_samples)
        hold_to(processor, eval_samples)
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
            with errors_of_workers():
                trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
        finally:
            _close_progress_bars(trainer)
        trainer.save_final(Path(recipe.output_dir) / MODEL)
        trainer.report_left_out()
    return trainer


def _close_progress_bars(trainer: LionTrainer) -> None:
    """Let an error's message come after the bars, which would otherwise be printed again when they are freed."""
    progress: Any = trainer.pop_callback(ProgressCallback)
    for bar in (progress and progress.training_bar, progress and progress.prediction_bar):
        if bar is not None:
            bar.close()


def schedule_rates(recipe: Recipe) -> dict[str, float]:
    """Return the first and last learning rate as fractions of the peak, for transformers' `SCHEDULE`."""
    optimizer = recipe.optimizer
    return {"min_lr_rate": optimizer.min_lr / optimizer.lr, "warmup_lr_rate": optimizer.warmup_lr / optimizer.lr}


def training_arguments(recipe: Recipe, evaluates: bool = True) -> TrainingArguments:
    """Return transformers' training arguments for the recipe on this machine.

    Raises:
        RecipeError: several GPUs or `parallel: fsdp` without `torchrun`, or a batch size that is not a multiple of what
            all processes take at a time.
    """
    optimizer, on_gpu = recipe.optimizer, torch.cuda.is_available()
    launched = "WORLD_SIZE" in os.environ
    if torch.cuda.device_count() > 1 and not launched:
        raise RecipeError(
            f"expected one process per GPU, got one for {torch.cuda.device_count()} GPUs: start with torchrun "
            "--nproc-per-node N --no-python lion-fast train ..., or select one GPU with CUDA_VISIBLE_DEVICES"
        )
    if recipe.parallel == "fsdp" and not launched:
        raise RecipeError("parallel: expected 'ddp' without torchrun, got 'fsdp'")
    sharded: dict[str, Any] = {}
    if recipe.parallel == "fsdp":
        sharded = {
            "fsdp": True,
            # LionTrainer shards the model itself, so accelerate must not wrap any module.
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
        logging_nan_inf_filter=False,  # LionTrainer checks for non-finite values itself
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.evaluation.every,
        save_strategy="steps",
        save_steps=recipe.checkpoints.every,
        dataloader_num_workers=recipe.data.workers,
        dataloader_multiprocessing_context=start_method() if recipe.data.workers else None,
        dataloader_prefetch_factor=recipe.data.prefetch if recipe.data.workers else None,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # the text branch of the Q-Former's last layer is unused
        use_cpu=not on_gpu,
        report_to="none",
        **sharded,
    )
