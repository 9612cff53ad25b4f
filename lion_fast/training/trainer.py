"""`LionTrainer`: transformers' Trainer with what neither a collator nor callbacks can do.

Data come in `TrainingOrder`; dropout is seeded by the position of the batch; checkpoints are written aside; a loss or
gradient that is not finite stops the run or skips the step; evaluation generates answers. Parameter groups are LION's.
Loop, accumulation, clipping, schedule, DDP and FSDP2 are the Trainer's.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.stages import parameter_groups
from lion_fast.training import saving
from lion_fast.training.data import POSITION, SAMPLE_IDS, LionCollator, TrainingData, TrainingOrder, seed_everything
from lion_fast.training.evaluation import draw_answers, evaluate, evaluated_indices
from lion_fast.training.recipe import Recipe

logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; the message names the step and its samples."""


class LionTrainer(Trainer):
    """Trains a model that `freeze_for_stage` has prepared, by a recipe.

    Args:
        model: on the CPU or on this process's device.
        args: as `lion_fast.training.run.training_arguments` makes them of the recipe.
        recipe: settings of optimizer, evaluation, checkpoints and of what is not finite.
        processor: makes the batches and reads the answers.
        order: keys of the samples of the whole run.
        train_samples: the data sets that `order` names.
        eval_samples: data sets to evaluate on; may be empty.
        data_collator: makes batches with `sample_ids` and `position`; `LionCollator(processor)` if None.
        callbacks: further ones.
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
        train_samples: dict[str, Dataset],
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
            train_dataset=TrainingData(train_samples, recipe.seed),
            eval_dataset=ConcatDataset(eval_samples.values()) if eval_samples else None,
            processing_class=processor,
            callbacks=[*(callbacks or []), _LogWithCheckpoints(), self._watch],
        )
        # The class's name makes Trainer take LION around a decoder-only model for one that shifts its labels.
        self._loss_shifts_labels = False

    def _get_train_sampler(self, train_dataset: Any = None) -> TrainingOrder:
        return self.order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            settings = self.recipe.optimizer
            groups = parameter_groups(
                self.model if model is None else model,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                boost_lr_scale=settings.boost_lr_scale,
            )
            self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        sample_ids = inputs.pop(SAMPLE_IDS)
        seed_everything(self.recipe.seed, inputs.pop(POSITION), 1)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._watch.note(sample_ids, loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # what is skipped leaves no hole in the curve

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
        """Write the model and its processor for `from_pretrained`, whole or not at all."""
        # Where parameters are sharded Trainer would write each process's part, which `from_pretrained` does not read.
        state = saving.gathered_state(self.model) if self.is_fsdp_enabled else None
        with self._written_aside(directory) as aside:
            if state is None:
                self.save_model(str(aside))
            elif self.is_world_process_zero():
                self._save(str(aside), state_dict=state)

    @contextmanager
    def _written_aside(self, target: Path) -> Iterator[Path]:
        first, wait = self.is_world_process_zero(), self.accelerator.wait_for_everyone
        with saving.written_aside(target, first=first, wait_for_all=wait) as directory:
            yield directory

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, exact match and grounding accuracy over the recipe's number of samples; pictures in `pictures/`."""
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
            draw_answers(shown).save(directory / f"step-{self.state.global_step}.png")
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _LogWithCheckpoints(TrainerCallback):
    """A point of the curve ends where a checkpoint is written: half a point's sum would not outlive the process."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= control.should_save


class _FiniteWatch(TrainerCallback):
    """Looks, before each optimizer step, whether its losses and gradients are finite on all processes."""

    def __init__(self, trainer: LionTrainer):
        self._trainer = trainer
        self._batches: list[tuple[list[str], Tensor]] = []

    def note(self, sample_ids: list[str], loss: Tensor) -> None:
        self._batches.append((sample_ids, loss.detach()))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        batches, self._batches = self._batches, []
        accelerator, model = self._trainer.accelerator, self._trainer.model
        norm = get_total_norm([_local(p.grad) for p in model.parameters() if p.grad is not None])
        losses = torch.stack([loss for _, loss in batches]).sum()
        bad: Any = accelerator.reduce((~(losses + norm).isfinite()).long().reshape(1), reduction="sum")
        if not bad.item():
            return
        report = self._report(state.global_step + 1, batches)
        if self._trainer.recipe.on_nonfinite == "stop":
            raise NonFiniteError(report)
        logger.warning("%s: skipped", report)
        for parameter in model.parameters():
            parameter.grad = None

    def _report(self, step: int, batches: list[tuple[list[str], Tensor]]) -> str:
        """Write `nonfinite/step-N.json`, and say the same in a line."""
        from accelerate.utils import gather_object

        found = gather_object([{"samples": ids, "loss": loss.item()} for ids, loss in batches])
        # DDP's losses are scaled by the number of processes over that of tokens; which are finite does not change.
        guilty = [batch for batch in found if not torch.tensor(batch["loss"]).isfinite()]
        directory = self._trainer.run_dir / "nonfinite"
        file = directory / f"step-{step}.json"
        if self._trainer.is_world_process_zero():
            directory.mkdir(parents=True, exist_ok=True)
            shares = [{**batch, "loss": repr(batch["loss"])} for batch in found]
            file.write_text(json.dumps({"step": step, "batches": shares}, indent=1) + "\n", encoding="utf-8")
        what = "loss" if guilty else "gradients"
        samples = ", ".join(sample for batch in guilty or found for sample in batch["samples"])
        return f"step {step}: {what} not finite, samples {samples} (all batches of the step: {file})"


def _local(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that FSDP shards."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[operator]
