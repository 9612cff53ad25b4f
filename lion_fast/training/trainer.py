"""`LionTrainer`: transformers' Trainer with the features that a collator and callbacks cannot add.

Data follow `TrainingOrder`; dropout is seeded by the position of the batch; checkpoints are atomic; a non-finite loss
or gradient stops the run or skips the step; evaluation generates answers; parameter groups are LION's. Loop,
accumulation, clipping, schedule, DDP and FSDP2 are the Trainer's.
"""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lion_fast.data.order import POSITION, TrainingData, TrainingOrder
from lion_fast.data.seeding import seed_everything
from lion_fast.io.atomic import whole_file, write_json
from lion_fast.io.checkpoints import naming
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.training import saving
from lion_fast.training.building import build_optimizer
from lion_fast.training.data import SAMPLE_IDS, LionCollator, TaskSamples
from lion_fast.training.evaluation import draw_answers, evaluate, evaluated_indices
from lion_fast.training.recipe import Recipe
from lion_fast.training.sharding import gathered_state, shard

logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; the message names the step and its samples."""


class LionTrainer(Trainer):
    """Trainer of a model prepared by `freeze_for_stage`, with the settings of a recipe.

    Args:
        model: on the CPU or on this process's device.
        args: the result of `lion_fast.training.run.training_arguments` for the recipe.
        recipe: settings of optimizer, evaluation, checkpoints and non-finite values.
        processor: makes the batches and decodes the answers.
        order: the samples of the whole run and their keys.
        eval_samples: datasets to evaluate on; may be empty.
        data_collator: makes batches with `sample_ids` and `position`; `LionCollator(processor)` if None.
        callbacks: additional callbacks.
    """

    model: Any

    def __init__(
        self,
        model: LionForCausalLM,
        args: TrainingArguments,
        *,
        recipe: Recipe,
        processor: LionProcessor,
        order: TrainingOrder,
        eval_samples: dict[str, Dataset],
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.recipe = recipe
        self.run_dir = Path(recipe.output_dir)
        self.order = order
        self._aside: Path | None = None
        self._watch = _FiniteWatch(self)
        super().__init__(
            model,
            args,
            data_collator=data_collator or LionCollator(processor),
            train_dataset=TrainingData(order.samples, recipe.seed, processor.resize if data_collator is None else None),
            eval_dataset=ConcatDataset(eval_samples.values()) if eval_samples else None,
            processing_class=processor,
            callbacks=[*(callbacks or []), _LogWithCheckpoints(), self._watch],
        )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.recipe.parallel == "fsdp" and not self.is_fsdp_enabled:
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            # accelerate enables FSDP on several GPUs only, but FSDP2 also runs over gloo and on one process. Without
            # this block, the model would be replicated and a sharded checkpoint not be read.
            state: Any = self.accelerator.state
            settings: Any = self.args.fsdp_plugin_args
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare model and optimizer: with FSDP2 here, because accelerate cannot shard LION; else as Trainer does.

        accelerate would put T5's embedding, one parameter with three names, into two FSDP groups, and would match the
        optimizer's parameters by address, which empty shards do not have.
        """
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.model_wrapped = shard(self.model, self.recipe.precision)
        self.optimizer = self.accelerator.prepare_optimizer(self.create_optimizer())
        self.create_scheduler(num_training_steps=max_steps)
        register_fsdp_forward_method(self.model, "generate")  # type: ignore[arg-type]
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint, self.model)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _resuming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint without some of the weights; Trainer warns, also about those that are tied to others."""
        tensors = self.model.state_dict(keep_vars=True)
        loaded = {id(tensor) for name, tensor in tensors.items() if name not in load_result.missing_keys}
        absent = [name for name in load_result.missing_keys if id(tensors[name]) not in loaded]
        if absent or load_result.unexpected_keys:
            raise ValueError(f"lacks {absent[:1]}, has {load_result.unexpected_keys[:1]} besides")

    def _get_train_sampler(self, train_dataset: Any = None) -> TrainingOrder:
        return self.order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.recipe.optimizer)
        return self.optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._watch.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._watch.norm

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        sample_ids = inputs.pop(SAMPLE_IDS)
        seed_everything(self.recipe.seed, inputs.pop(POSITION), 1)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._watch.note(sample_ids, loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # a skipped step must not turn the logged mean into NaN

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._written_aside(self.run_dir / f"checkpoint-{self.state.global_step}") as directory:
            self._aside = directory.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
        if self.is_world_process_zero():
            saving.keep_newest(self.run_dir, self.recipe.checkpoints.keep)

    def save_final(self, directory: Path) -> None:
        """Write the model and its processor for `from_pretrained`, atomically."""
        # Trainer would write one part per process of a sharded model, which `from_pretrained` does not read.
        state = gathered_state(self.model) if self.is_fsdp_enabled else None
        with self._written_aside(directory) as aside:
            if state is None:
                self.save_model(str(aside))
            elif self.is_world_process_zero():
                self._save(str(aside), state_dict=state)

    def report_left_out(self) -> None:
        """Print the numbers of lines and samples of the training data that `data.skip_bad` skipped."""
        own = [d.left_out for d in self.order.samples.values() if isinstance(d, TaskSamples)]
        lines, images = (sum(counts) for counts in zip((0, 0), *own, strict=True))
        # Every process has checked all lines, but read only the images of its own samples.
        total = self.accelerator.reduce(torch.tensor([images], device=self.args.device), reduction="sum")
        images = int(total.item())  # type: ignore[union-attr]
        if self.is_world_process_zero() and (lines or images):
            print(f"data.train: skipped {lines} invalid lines and {images} samples with an unreadable image")

    def _written_aside(self, target: Path) -> AbstractContextManager[Path]:
        first, wait = self.is_world_process_zero(), self.accelerator.wait_for_everyone
        return saving.written_aside(target, first=first, wait_for_all=wait)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute loss, exact match and grounding accuracy over the recipe's number of samples.

        The first answers are drawn in `pictures/`.
        """
        samples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        settings, model = self.recipe.evaluation, self.model
        was_training = model.training
        model.eval()
        metrics, shown = evaluate(
            model,
            self.processing_class,
            samples,
            indices=evaluated_indices(samples, settings.samples),
            batch_size=self.args.per_device_eval_batch_size,
            device=self.args.device,
            pictures=settings.pictures if self.is_world_process_zero() else 0,
            autocast=lambda: self.accelerator.autocast(),
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
        )
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if shown:
            directory = self.run_dir / "pictures"
            directory.mkdir(parents=True, exist_ok=True)
            with whole_file(directory / f"step-{self.state.global_step}.png") as unfinished:
                draw_answers(shown).save(unfinished, format="png")
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def expect_resumable(checkpoint: Path) -> None:
    """Check the state of the trainer in a checkpoint, which `Trainer.train` reads first.

    Raises:
        CheckpointError: it cannot be read, or is of another step.
    """
    file = checkpoint / TRAINER_STATE_NAME
    with naming(file, "the state of a trainer at the step of its checkpoint"):
        state = TrainerState.load_from_json(str(file))
        if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}":
            raise ValueError(f"step {str(state.global_step)[:20]}")
        if not all(isinstance(entry, dict) for entry in state.log_history):
            raise ValueError("log_history without entries")


def _resuming(checkpoint: str | None) -> AbstractContextManager[None]:
    """Give errors of loading a checkpoint its name."""
    return naming(checkpoint or "", "a checkpoint that the trainer can resume from")


class _LogWithCheckpoints(TrainerCallback):
    """Callback that logs whenever a checkpoint is saved, because a checkpoint does not hold a partial sum of losses."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= control.should_save


class _FiniteWatch(TrainerCallback):
    """Callback that checks before each optimizer step whether losses and gradients are finite on all processes."""

    def __init__(self, trainer: LionTrainer):
        self._trainer = trainer
        self._batches: list[tuple[list[str], Tensor]] = []
        self.norm: Any = None  # global gradient norm before clipping, set by LionTrainer._get_grad_norm

    def note(self, sample_ids: list[str], loss: Tensor) -> None:
        self._batches.append((sample_ids, loss.detach()))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        batches, self._batches = self._batches, []
        accelerator, model = self._trainer.accelerator, self._trainer.model
        losses = torch.stack([loss for _, loss in batches]).sum()
        bad: Any = accelerator.reduce((~(losses + self.norm).isfinite()).long().reshape(1), reduction="sum")
        if not bad.item():
            return
        report = self._report(state.global_step + 1, batches)
        if self._trainer.recipe.on_nonfinite == "stop":
            raise NonFiniteError(report)
        logger.warning("%s: skipped", report)
        for parameter in model.parameters():
            parameter.grad = None

    def _report(self, step: int, batches: list[tuple[list[str], Tensor]]) -> str:
        """Write `nonfinite/step-N.json` and return a summary in one line."""
        from accelerate.utils import gather_object

        found = gather_object([{"samples": ids, "loss": loss.item()} for ids, loss in batches])
        # DDP scales the losses by a finite positive factor, which does not change whether they are finite.
        guilty = [batch for batch in found if not torch.tensor(batch["loss"]).isfinite()]
        directory = self._trainer.run_dir / "nonfinite"
        file = directory / f"step-{step}.json"
        if self._trainer.is_world_process_zero():
            directory.mkdir(parents=True, exist_ok=True)
            shares = [{**batch, "loss": repr(batch["loss"])} for batch in found]
            write_json(file, {"step": step, "batches": shares})
        what = "loss" if guilty else "gradients"
        samples = ", ".join(sample for batch in guilty or found for sample in batch["samples"])
        return f"step {step}: {what} not finite, samples {samples} (all batches of the step: {file})"
