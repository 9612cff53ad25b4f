"""The recipe of a training run: the settings of a stage's YAML, read strictly.

`recipes/stage1.yaml` to `stage4.yaml` hold every setting with the source of its value. The user's file overrides the
stage's recipe, and `section.key=value` overrides both.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from lion_fast.io.reading import shown
from lion_fast.tasks import TASKS
from lion_fast.training.definitions import STAGES, Stage, stage_of
from lion_fast.training.sections import Limits, PathName, RecipeError, Section, shown_name
from lion_fast.training.settings_files import parse_settings, parse_value, read_settings

SCENES = "scenes:"

_LARGEST = 2**31 - 1
_MAX_PARTS = 50  # of an override's key
_Share = Annotated[float, Limits(at_least=0, at_most=1)]
_Beta = Annotated[float, Limits(at_least=0, below=1)]
_Count = Annotated[int, Limits(at_least=1, at_most=_LARGEST)]
_CountOrZero = Annotated[int, Limits(at_least=0, at_most=_LARGEST)]
_Directory = Annotated[str, PathName()]
_Source = Annotated[str, PathName(unless=SCENES)]


@dataclass(frozen=True)
class Model(Section):
    """Sources of the initial weights.

    Args:
        frozen_from: directory of a LION model that provides the configuration and the parameters that no stage trains
            (vision tower, language model); everything else is initialised at random.
        qformer_from: Q-Former of BLIP-2's first stage or InstructBLIP to start from (`lion_fast.training.qformer`).
        carry_over: directories of LION models whose parameters `stages.carry_over` copies, in order; without
            `frozen_from`, the first provides the configuration.
        dropout: replaces every dropout rate of the configuration; None keeps them.
        kernel_backend: `LionConfig.kernel_backend`.
    """

    frozen_from: Annotated[str | None, PathName()]
    qformer_from: Annotated[str | None, PathName()]
    carry_over: list[_Directory]
    dropout: Annotated[float | None, Limits(at_least=0, below=1)]
    kernel_backend: Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class Sources(Section):
    """Sources of samples per task: JSONL files, directories of shards, or `scenes:SEED:COUNT` for generated scenes.

    A source may serve both tasks, each of which takes its own samples of it. Within a task, a source is given once.
    """

    image_level: list[_Source]
    region_level: list[_Source]

    def contradictions(self) -> Iterator[str]:
        for task in TASKS:
            by_path: dict[str, str] = {}
            for name in getattr(self, task):
                path = name if name.startswith(SCENES) else os.path.realpath(name)
                if path in by_path:
                    yield f"{task}: expected each source once, got {shown(by_path[path])} and {shown(name)}"
                by_path[path] = name


@dataclass(frozen=True)
class Shares(Section):
    """Relative number of turns of each task in a stage that trains several."""

    image_level: Annotated[int, Limits(at_least=1, at_most=1000)]
    region_level: Annotated[int, Limits(at_least=1, at_most=1000)]


@dataclass(frozen=True)
class Augmentation(Section):
    """Augmentation of region-level samples in training; boxes and their text move with the pixels.

    Args:
        flip: probability of a horizontal flip, for samples whose words stay true.
        crop: probability of a crop, for samples whose words stay true; no box is cut.
        crop_min_scale: smallest fraction of each side that a crop keeps.
    """

    flip: _Share
    crop: _Share
    crop_min_scale: Annotated[float, Limits(above=0, at_most=1)]


@dataclass(frozen=True)
class Data(Section):
    """Data of training and evaluation, and their order.

    Args:
        train, evaluate: see `Sources`.
        image_root: directory that image paths in JSONL files are relative to; None for the directory of the file.
        skip_bad: whether invalid lines and unreadable images are skipped and counted instead of raising an error.
        tagger: directory of a `RamTagger`, for images whose record has no tags; None for no tagger.
        augmentation: see `Augmentation`.
        shares: see `Shares`.
        mix: whether tasks alternate between samples or between steps.
        shuffle: whether every epoch of a task is shuffled.
        group_by_length: whether a batch has samples of similar length (`lion_fast.data.TrainingOrder`).
        workers: processes that load samples, per training process.
        prefetch: batches that each worker loads in advance.
    """

    train: Sources
    evaluate: Sources
    image_root: Annotated[str | None, PathName()]
    skip_bad: bool
    tagger: Annotated[str | None, PathName()]
    augmentation: Augmentation
    shares: Shares
    mix: Literal["sample", "step"]
    shuffle: bool
    group_by_length: bool
    workers: Annotated[int, Limits(at_least=0, at_most=1024)]
    prefetch: Annotated[int, Limits(at_least=1, at_most=1024)]

    def contradictions(self) -> Iterator[str]:
        if self.group_by_length and not self.shuffle:
            yield "group_by_length: expected false with shuffle false, because grouping changes the order, got True"


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW and its schedule: linear from `warmup_lr` to `lr`, then a cosine decay to `min_lr`.

    Args:
        boost_lr_scale: factor on the aggregator's learning rate.
        clip: maximum global gradient norm; 0 disables clipping.
    """

    lr: Annotated[float, Limits(above=0)]
    min_lr: Annotated[float, Limits(at_least=0)]
    warmup_lr: Annotated[float, Limits(at_least=0)]
    warmup_steps: _CountOrZero
    betas: tuple[_Beta, _Beta]
    weight_decay: Annotated[float, Limits(at_least=0)]
    boost_lr_scale: Annotated[float, Limits(above=0)]
    clip: Annotated[float, Limits(at_least=0)]

    def contradictions(self) -> Iterator[str]:
        for name in ("min_lr", "warmup_lr"):
            if not math.isfinite(getattr(self, name) / self.lr):
                yield f"lr: expected a rate that {name} {getattr(self, name)} can be divided by, got {self.lr}"


@dataclass(frozen=True)
class Batch(Section):
    """Samples per optimizer step over all processes (`size`), and per micro-batch of a process (`per_process`).

    Gradients are accumulated over micro-batches, and the loss is averaged over all target tokens of the step. Neither
    `per_process` nor the number of processes changes the step, except that `per_process` changes the dropout masks.
    """

    size: _Count
    per_process: _Count

    def accumulation(self, processes: int) -> int:
        """Return the number of micro-batches per step and process.

        Raises:
            RecipeError: `size` is not a multiple of `per_process` times the number of processes.
        """
        if self.size % (self.per_process * processes):
            raise RecipeError(
                f"batch.size: expected a multiple of {self.per_process * processes} (batch.per_process "
                f"{self.per_process} x {processes} processes), got {self.size}"
            )
        return self.size // (self.per_process * processes)


@dataclass(frozen=True)
class Evaluation(Section):
    """Evaluation during training.

    Args:
        every: steps between evaluations.
        samples: maximum number of samples.
        pictures: number of samples that are drawn with their answers.
    """

    every: _Count
    samples: _Count
    pictures: _CountOrZero
    max_new_tokens: _Count
    num_beams: Annotated[int, Limits(at_least=1, at_most=1024)]


@dataclass(frozen=True)
class Checkpoints(Section):
    """Checkpoints.

    Args:
        every: steps between checkpoints.
        keep: number of newest checkpoints that are kept.
    """

    every: _Count
    keep: _Count


@dataclass(frozen=True)
class Recipe(Section):
    """All settings of one run.

    Args:
        stage: 1, 2, 3 or 4 (`lion_fast.training.stages.STAGES`).
        output_dir: directory of checkpoints, curves, drawn answers and, at the end, the model in `model/`.
        steps: optimizer steps.
        seed: seed of the initial weights, the data order and dropout.
        precision: `bf16` keeps frozen parameters in bfloat16 and computes under autocast; trained parameters stay
            float32.
        on_nonfinite: whether a NaN or infinite loss or gradient stops the run or skips the step.
        parallel: whether several processes replicate the model (`ddp`) or shard it (`fsdp`, FSDP2).
        log_every: steps between points of the curves.
    """

    stage: Annotated[int, Limits(at_least=1, at_most=len(STAGES))]
    output_dir: _Directory
    model: Model
    data: Data
    optimizer: Optimizer
    batch: Batch
    steps: _Count
    seed: Annotated[int, Limits(at_least=0, at_most=2**32 - 1)]
    precision: Literal["bf16", "fp32"]
    gradient_checkpointing: bool
    on_nonfinite: Literal["stop", "skip"]
    parallel: Literal["ddp", "fsdp"]
    log_every: _Count
    evaluation: Evaluation
    checkpoints: Checkpoints

    @property
    def definition(self) -> Stage:
        return stage_of(self.stage)

    def check_sources(self) -> None:
        """Check that a model is given, and data for exactly the tasks that the stage trains.

        Raises:
            RecipeError: names the key otherwise.
        """
        if self.model.frozen_from is None and not self.model.carry_over:
            raise RecipeError("model: expected a directory in model.frozen_from or model.carry_over, got neither")
        if self.model.qformer_from is not None and self.definition.visual_input == "AGGREGATOR":
            raise RecipeError(
                f"model.qformer_from: expected null in stage {self.stage}, which has no Q-Former, "
                f"got {shown(self.model.qformer_from)}"
            )
        for task in TASKS:
            sources, wanted = getattr(self.data.train, task), task in self.definition.tasks
            if wanted != bool(sources):
                expected = "one file or more" if wanted else f"none in stage {self.stage}"
                raise RecipeError(f"data.train.{task}: expected {expected}, got {shown(sources)}")


# Keys that may change when a run is resumed: none of them changes the samples of a step or the loss over them.
# `batch.per_process` changes the dropout masks, because each micro-batch is seeded separately.
# The directory of a run may be moved, or be given by another of its names.
RESUMABLE_CHANGES = ("output_dir", "batch.per_process", "data.workers", "data.prefetch", "evaluation", "checkpoints")


def shipped_recipe(stage: int) -> str:
    """Return the commented YAML of a stage."""
    return (files("lion_fast.training") / "recipes" / f"stage{stage}.yaml").read_text(encoding="utf-8")


def load_recipe(stage: int, file: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Load the stage's recipe, overridden by `file` and then by `overrides`.

    Args:
        stage: 1, 2, 3 or 4.
        file: YAML with the settings that differ from the stage's.
        overrides: `section.key=value` each, with the value in YAML; of two for one key, the later one counts.

    Raises:
        RecipeError: YAML cannot be read, a key is unknown, or a value has the wrong type.
        OSError: `file` cannot be opened.
    """
    stage = stage_of(stage).number
    settings = parse_settings(shipped_recipe(stage), f"stage{stage}.yaml")
    if file is not None:
        settings = _laid_over(settings, _renamed(read_settings(Path(file))))
    for override in overrides:
        settings = _laid_over(settings, _renamed(_parse_override(override)))
    if settings["stage"] != stage:
        raise RecipeError(f"stage: expected {stage} (the requested stage), got {shown(settings['stage'])}")
    return Recipe.read(settings)


def dump_recipe(recipe: Recipe) -> str:
    """Return the YAML of a recipe with every key."""
    return yaml.safe_dump(recipe.plain(), sort_keys=False)


def check_resumable(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Check that a run can be resumed with new settings.

    Args:
        old: plain data of the recipe that the run started with, possibly written by an earlier version.
        new: plain data of the recipe to resume with.

    Raises:
        RecipeError: keys other than `RESUMABLE_CHANGES` differ; the message names them.
    """
    before, after = _flat(_renamed(old, warn=False)), _flat(new)
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    differing = [key for key in changed if not f"{key}.".startswith(tuple(f"{ok}." for ok in RESUMABLE_CHANGES))]
    if differing:
        key = differing[0]
        raise RecipeError(
            f"{shown_name(key)}: expected {shown(before.get(key))}, as at the start of the run, "
            f"got {shown(after.get(key))}"
            + (f" (and {', '.join(map(shown_name, differing[1:6]))})" if differing[1:] else "")
        )


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, value = override.partition("=")
    if not equals or not all(name.split(".")) or name.count(".") >= _MAX_PARTS:
        raise RecipeError(f"override: expected section.key=value, got {shown(override)}")
    settings = parse_value(value, shown_name(name))
    for part in reversed(name.split(".")):
        settings = {part: settings}
    return settings


def _renamed(settings: dict[str, Any], warn: bool = True) -> dict[str, Any]:
    """Rename deprecated keys: until 0.2, `data.image_to_region`, a list, may be given instead of `data.shares`.

    Raises:
        RecipeError: `data.image_to_region` is not a list of two, or both keys are given.
    """
    data = settings.get("data")
    if not isinstance(data, dict) or "image_to_region" not in data:
        return settings
    data = dict(data)
    pair = data.pop("image_to_region")
    if not isinstance(pair, list) or len(pair) != 2:
        raise RecipeError(f"data.image_to_region: expected a list of 2, got {shown(pair)}")
    if "shares" in data:
        raise RecipeError("data.image_to_region: expected data.shares alone, got both")
    if warn:
        warnings.warn(
            "data.image_to_region is now data.shares, {image_level: ..., region_level: ...}; 0.2 removes the old key",
            FutureWarning,
            stacklevel=3,
        )
    data["shares"] = {"image_level": pair[0], "region_level": pair[1]}
    return {**settings, "data": data}


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
