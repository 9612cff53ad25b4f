"""Curves and images for TensorBoard."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lion_fast.extras import MissingExtraError, require
from lion_fast.io.reading import naming_path

logger = logging.getLogger(__name__)


class TensorBoardCurves(TrainerCallback):
    """Callback that writes every logged number and the evaluation's drawn answers to `OUTPUT/tensorboard`.

    When a run is resumed, transformers' own callback does not purge the points after the checkpoint. Without
    TensorBoard, this callback logs a warning, and only `trainer_state.json` has the curves.
    """

    def __init__(self):
        self._writer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            try:
                require("train", "tensorboard")
            except MissingExtraError as error:
                logger.warning("no curves for TensorBoard: %s", error)
                return
            from torch.utils.tensorboard import SummaryWriter

            log_dir = Path(args.output_dir or ".") / "tensorboard"
            with naming_path(log_dir):
                self._writer = SummaryWriter(str(log_dir), purge_step=state.global_step + 1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self._writer is not None:
            for name, value in (logs or {}).items():
                if isinstance(value, int | float) and name not in ("epoch", "step"):
                    tag = name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"
                    with naming_path(self._writer.log_dir):
                        self._writer.add_scalar(tag, value, state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        drawing = Path(args.output_dir or ".") / "pictures" / f"step-{state.global_step}.png"
        if self._writer is not None and drawing.is_file():
            pixels = np.asarray(Image.open(drawing).convert("RGB"))
            with naming_path(self._writer.log_dir):
                self._writer.add_image("eval/answers", pixels, state.global_step, dataformats="HWC")
                self._writer.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._writer is not None:
            with naming_path(self._writer.log_dir):
                self._writer.close()
