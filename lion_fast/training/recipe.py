"""The recipe of a training run: what a stage's YAML may say, read strictly.

`recipes/stage1.yaml` to `stage4.yaml` hold every setting with the source of its number. A run takes its stage's recipe,
lays the user's file over it and `section.key=value` over that.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from lion_fast.configuration_lion import TASKS
from lion_fast.training.sections import Limits, RecipeError, Section
from lion_fast.training.stages import STAGES, Stage, stage_of

_Share = Annotated[float, Limits(at_least=0, at_most=1)]
_Count = Annotated[int, Limits(at_least=1)]


@dataclass(frozen=True)
class Model(Section):
    """Where the weights at the start come from.

    Args:
        frozen_from: directory of a LION model that gives its configuration and what no stage trains (vision tower,
            language model); everything else starts at random.
        qformer_from: a Q-Former of BLIP-2's first stage or InstructBLIP to start from (`lion_fast.training.qformer`).
        carry_over: directories of LION models whose parameters are copied in order, by `stages.carry_over`;
            without `frozen_from` the first gives the configuration.
        dropout: replaces every rate of dropout of the configuration; None leaves them.
        kernel_backend: `LionConfig.kernel_backend`.
    """

    frozen_from: str | None
    qformer_from: str | None
    carry_over: list[str]
    dropout: Annotated[float | None, Limits(at_least=0, below=1)]
    kernel_backend: Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class Sources(Section):
    """Where samples are, per task: JSONL files, directories of shards, or `scenes:SEED:COUNT` for generated ones."""

    image_level: list[str]
    region_level: list[str]


@dataclass(frozen=True)
class Shares(Section):
    """How often each task has its turn in a stage that trains several."""

    image_level: _Count
    region_level: _Count


@dataclass(frozen=True)
class Augmentation(Section):
    """What is done to region-level samples in training; their boxes, and the text of them, go with the pixels.

    Args:
        flip: share of the samples that are mirrored, of those whose words bear it.
        crop: share of the samples that are cut, of those whose words bear it; boxes stay whole.
        crop_min_scale: shortest part of each side that a cut keeps.
    """

    flip: _Share
    crop: _Share
    crop_min_scale: Annotated[float, Limits(above=0, at_most=1)]


@dataclass(frozen=True)
class Data(Section):
    """What is trained and evaluated on, and in which order.

    Args:
        train, evaluate: see `Sources`.
        image_root: folder that the pictures' paths in JSONL files start from; None for the file's own folder.
        skip_bad: whether lines and pictures that cannot be used are left out and counted, instead of being errors.
        tagger: directory of a `RamTagger`, for pictures whose record has no tags; None for none.
        augmentation: see `Augmentation`.
        shares: see `Shares`.
        mix: whether tasks take turns from sample to sample or from step to step.
        shuffle: whether every pass over a task's samples has an order of its own.
        group_by_length: whether batches are of samples of alike length (`lion_fast.data.TrainingOrder`).
        workers: processes that load samples, per training process.
        prefetch: batches that each of them is ahead.
    """

    train: Sources
    evaluate: Sources
    image_root: str | None
    skip_bad: bool
    tagger: str | None
    augmentation: Augmentation
    shares: Shares
    mix: Literal["sample", "step"]
    shuffle: bool
    group_by_length: bool
    workers: Annotated[int, Limits(at_least=0)]
    prefetch: _Count

    def contradictions(self) -> Iterator[str]:
        if self.group_by_length and not self.shuffle:
            yield "group_by_length: expected false where shuffle is false, as it changes the order, got True"


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW and its schedule: linear from `warmup_lr` to `lr`, then a cosine that ends at `min_lr`.

    Args:
        boost_lr_scale: factor on the aggregator's learning rate.
        clip: largest norm of all gradients together; 0 does not clip.
    """

    lr: Annotated[float, Limits(above=0)]
    min_lr: Annotated[float, Limits(at_least=0)]
    warmup_lr: Annotated[float, Limits(at_least=0)]
    warmup_steps: Annotated[int, Limits(at_least=0)]
    betas: tuple[float, float]
    weight_decay: Annotated[float, Limits(at_least=0)]
    boost_lr_scale: Annotated[float, Limits(above=0)]
    clip: Annotated[float, Limits(at_least=0)]


@dataclass(frozen=True)
class Batch(Section):
    """Samples per optimizer step over all processes, and how many a process takes at a time.

    What is left of `size` is accumulated; the loss is weighed by target tokens over the whole of it, so neither
    `per_process` nor the number of processes changes the step, but for `per_process` what dropout drops.
    """

    size: _Count
    per_process: _Count

    def accumulation(self, processes: int) -> int:
        """Micro-batches per step and process.

        Raises:
            RecipeError: `size` is no multiple of what all processes take at a time.
        """
        if self.size % (self.per_process * processes):
            raise RecipeError(
                f"batch.size: expected a multiple of {self.per_process * processes} (batch.per_process "
                f"{self.per_process} x {processes} processes), got {self.size}"
            )
        return self.size // (self.per_process * processes)


@dataclass(frozen=True)
class Evaluation(Section):
    """Args: every: steps between evaluations; samples: how many of the data at most; pictures: how many are drawn."""

    every: _Count
    samples: _Count
    pictures: Annotated[int, Limits(at_least=0)]
    max_new_tokens: _Count
    num_beams: _Count


@dataclass(frozen=True)
class Checkpoints(Section):
    """Args: every: steps between checkpoints; keep: how many of the newest stay."""

    every: _Count
    keep: _Count


@dataclass(frozen=True)
class Recipe(Section):
    """All settings of one run.

    Args:
        stage: 1, 2, 3 or 4 (`lion_fast.training.stages.STAGES`).
        output_dir: checkpoints, curves, pictures and, at the end, the model in `model/`.
        steps: optimizer steps.
        seed: of random weights, order of the data and dropout.
        precision: `bf16` keeps frozen parameters in bfloat16 and computes under autocast; trained ones stay float32.
        on_nonfinite: what a loss or gradient that is NaN or infinite does: stop the run, or skip the step.
        parallel: what several processes do with the model: `ddp` copies it, `fsdp` (FSDP2) shards it.
        log_every: steps between points of the curves.
    """

    stage: Annotated[int, Limits(at_least=1, at_most=len(STAGES))]
    output_dir: str
    model: Model
    data: Data
    optimizer: Optimizer
    batch: Batch
    steps: _Count
    seed: Annotated[int, Limits(at_least=0)]
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
        """Refuse a run without a model, without data of a task that its stage trains, or with data of another.

        Raises:
            RecipeError: naming the key.
        """
        if self.model.frozen_from is None and not self.model.carry_over:
            raise RecipeError("model: expected a directory in model.frozen_from or model.carry_over, got neither")
        if self.model.qformer_from is not None and self.definition.visual_input == "AGGREGATOR":
            raise RecipeError(
                f"model.qformer_from: expected null in stage {self.stage}, which has no Q-Former, "
                f"got {self.model.qformer_from!r}"
            )
        for task in TASKS:
            sources, wanted = getattr(self.data.train, task), task in self.definition.tasks
            if wanted != bool(sources):
                expected = "one file or more" if wanted else f"none in stage {self.stage}"
                raise RecipeError(f"data.train.{task}: expected {expected}, got {sources}")


# What a run may change when it goes on: none of it touches the samples of a step or the loss over them. Of dropout's
# numbers a micro-batch has its own, so with `per_process` they are others.
RESUMABLE_CHANGES = ("batch.per_process", "data.workers", "data.prefetch", "evaluation", "checkpoints")


def shipped_recipe(stage: int) -> str:
    """The commented YAML of a stage."""
    return (files("lion_fast.training") / "recipes" / f"stage{stage}.yaml").read_text(encoding="utf-8")


def load_recipe(stage: int, file: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The stage's recipe with `file` and then `overrides` laid over it.

    Args:
        stage: 1, 2, 3 or 4.
        file: YAML with the settings that differ.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        RecipeError: for YAML that cannot be read, unknown keys, and values of the wrong kind.
        OSError: `file` cannot be opened.
    """
    settings = _parse(shipped_recipe(stage), f"stage{stage}.yaml")
    if file is not None:
        settings = _laid_over(settings, _renamed(_parse(Path(file).read_text(encoding="utf-8"), str(file))))
    for override in overrides:
        settings = _laid_over(settings, _renamed(_parse_override(override)))
    if settings["stage"] != stage:
        raise RecipeError(f"stage: expected {stage} (the stage that was asked for), got {settings['stage']!r}")
    return Recipe.read(settings)


def dump_recipe(recipe: Recipe) -> str:
    """The YAML of a recipe, every key written out."""
    return yaml.safe_dump(recipe.plain(), sort_keys=False)


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys whose values differ."""
    changed = []
    for key in dict.fromkeys([*old, *new]):
        before, after, name = old.get(key), new.get(key), prefix + str(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += changed_keys(before, after, f"{name}.")
        elif before != after:
            changed.append(name)
    return changed


def check_resumable(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with a run under settings that would have led elsewhere.

    Args:
        old: plain data of the recipe that the run began with, which may be that of an earlier version.
        new: that of the recipe it is to go on with.

    Raises:
        RecipeError: naming the keys that differ.
    """
    old = _renamed(old, warn=False)
    differing = [
        key
        for key in changed_keys(old, new)
        if not any(key == ok or key.startswith(f"{ok}.") for ok in RESUMABLE_CHANGES)
    ]
    if differing:
        key = differing[0]
        raise RecipeError(
            f"{key}: expected {_at(old, key)!r}, with which the run began, got {_at(new, key)!r}"
            + (f" (and {', '.join(differing[1:])})" if differing[1:] else "")
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: `1e-4` is one, where PyYAML follows YAML 1.1 and reads a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        loaded = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not readable as YAML ({' '.join(str(error).split())})") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise RecipeError(f"{name}: expected keys with values, got {type(loaded).__name__}")
    return loaded


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, value = override.partition("=")
    if not equals or not all(name.split(".")):
        raise RecipeError(f"override: expected section.key=value, got {override!r}")
    try:
        settings: Any = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not readable as YAML: {value!r}") from error
    for part in reversed(name.split(".")):
        settings = {part: settings}
    return settings


def _renamed(settings: dict[str, Any], warn: bool = True) -> dict[str, Any]:
    """The settings under today's keys: until 0.2 `data.image_to_region`, a list, may stand for `data.shares`.

    Raises:
        RecipeError: `data.image_to_region` is no list of two, or both keys are there.
    """
    data = settings.get("data")
    if not isinstance(data, dict) or "image_to_region" not in data:
        return settings
    data = dict(data)
    pair = data.pop("image_to_region")
    if not isinstance(pair, list) or len(pair) != 2:
        raise RecipeError(f"data.image_to_region: expected a list of 2, got {pair!r}")
    if "shares" in data:
        raise RecipeError("data.image_to_region: expected data.shares alone, got both")
    if warn:
        warnings.warn(
            "data.image_to_region is now data.shares, {image_level: ..., region_level: ...}; the old key goes in 0.2",
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


def _at(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
