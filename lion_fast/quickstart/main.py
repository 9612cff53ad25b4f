"""LION's whole training on two CPU cores in minutes, without downloads."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lion_fast.extras import require
from lion_fast.io.atomic import UNFINISHED, whole_directory, write_json, write_text
from lion_fast.io.checkpoints import naming_output
from lion_fast.io.reading import read_content, shown
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.quickstart.data import SceneSet, compute_features, easy_scenes, render, training_batches
from lion_fast.quickstart.evaluation import Metrics, answer, evaluate
from lion_fast.quickstart.loop import Run, train_lion
from lion_fast.quickstart.models import build_config, build_processor
from lion_fast.quickstart.parallel import side_by_side
from lion_fast.quickstart.report import Showpiece, draw_curves, draw_grid, format_table
from lion_fast.quickstart.standins import train_language, train_vision
from lion_fast.scenes import SceneGenerator
from lion_fast.training.run_folder import owned_directory
from lion_fast.training.stages import STAGES, Stage, carry_over, copy_frozen, freeze_for_stage

KINDS = {1: ("caption", "vqa"), 2: ("rec",), 3: ("caption", "rec", "vqa", "rec")}
MUON_LR, ADAMW_LR = {1: 0.01, 2: 0.006, 3: 0.004}, {1: 1.5e-3, 2: 3e-3, 3: 1.5e-3}
_SHOWN, _SHOWN_SIZE = 8, 384
_METRICS = "metrics.json"
_FILES = ("checkpoint", "predictions.png", "losses.png", "table.txt", _METRICS)
_MAX_SCALE = 1000


@dataclass(frozen=True)
class Settings:
    """Sizes and steps of a quickstart; the defaults take under ten minutes on two cores."""

    train_scenes: int = 24000
    test_scenes: int = 500
    vision_steps: int = 3000
    vision_batch_size: int = 32
    language_steps: int = 1900
    language_batch_size: int = 64
    stage_steps: tuple[int, int, int] = (600, 650, 450)
    batch_size: int = 64

    def scaled(self, factor: float) -> "Settings":
        """Return the settings with `factor` times the steps."""

        def steps(count: int) -> int:
            return max(1, round(count * factor))

        first, second, third = map(steps, self.stage_steps)
        return replace(
            self,
            vision_steps=steps(self.vision_steps),
            language_steps=steps(self.language_steps),
            stage_steps=(first, second, third),
        )


SMOKE = Settings(
    train_scenes=24,
    test_scenes=8,
    vision_steps=6,
    vision_batch_size=4,
    language_steps=4,
    language_batch_size=8,
    stage_steps=(4, 4, 4),
    batch_size=8,
)


def run(
    output_dir: str | Path, *, seed: int = 0, scale: float = 1.0, smoke: bool = False, show: bool = True
) -> dict[str, Any]:
    """Train LION's three stages on scenes and report the metrics after each stage.

    The run writes to `output_dir`: `checkpoint/` (loads with `LionForCausalLM.from_pretrained` and
    `LionProcessor.from_pretrained`), `predictions.png`, `losses.png`, `table.txt` and `metrics.json`.

    Args:
        output_dir: created if it does not exist; files of an earlier quickstart are overwritten.
        seed: seed of the scenes and the initial weights, below 2^32.
        scale: factor on all numbers of steps, up to 1000.
        smoke: run every part in seconds, without learning anything.
        show: print the progress, the table and the paths of the files.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: `seed` or `scale` is out of range, or `output_dir` holds files of these names that no quickstart
            wrote.
        OutputInUseError: another run is using `output_dir`.
        OSError: a file cannot be written; those of an earlier quickstart are complete.
        MissingExtraError: matplotlib is not installed.
    """
    require("quickstart", "matplotlib")  # fail before the training, although drawing comes last
    if not (isinstance(scale, int | float) and 0 < scale <= _MAX_SCALE):
        raise ValueError(f"scale: expected a positive factor up to {_MAX_SCALE}, got {shown(scale)}")
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"seed: expected a whole number from 0 to {2**32 - 1}, got {shown(seed)}")
    output_dir = Path(output_dir)
    with owned_directory(output_dir):
        _expect_own(output_dir)
        settings = SMOKE if smoke else Settings().scaled(scale)
        return _run(output_dir, settings, seed, print if show else lambda *_: None)


def _run(output_dir: Path, settings: Settings, seed: int, say: Callable[..., Any]) -> dict[str, Any]:
    start = time.perf_counter()

    say("Scenes: coloured shapes and signs, with captions, questions and boxes")
    processor = build_processor()
    train_set = render(easy_scenes(2 * seed, text_rate=0.25), settings.train_scenes, processor, "training scenes")
    test_set = render(easy_scenes(2 * seed + 1), settings.test_scenes, processor, "unseen scenes")

    say("Step 0: stand-ins for EVA and Flan-T5, frozen in all stages")
    torch.manual_seed(seed)
    models = [LionForCausalLM(build_config(processor, stage.visual_input)) for stage in STAGES[:3]]
    joint = models[-1]
    runs = list(_train_standins(joint, models[0], processor, train_set, settings, seed))
    copy_frozen(joint, models[0], "vision_model.")
    for model in models[1:]:
        copy_frozen(models[0], model)
    for scene_set in (train_set, test_set):
        compute_features(joint, scene_set)

    rows = {"before stage 1": evaluate(joint, processor, test_set)}
    say("Stages 1 and 2: image level and region level")

    def train_and_evaluate(number: int) -> tuple[dict[str, Tensor], Run, Metrics]:
        model, stage = models[number - 1], STAGES[number - 1]
        run = _train_stage(model, stage, processor, train_set, settings, seed)
        return model.state_dict(), run, evaluate(model, processor, test_set)

    outcomes = side_by_side(lambda: train_and_evaluate(1), lambda: train_and_evaluate(2))
    for stage, model, (state, run, metrics) in zip(STAGES[:2], models[:2], outcomes, strict=True):
        model.load_state_dict(state)
        runs.append(run)
        rows[f"after stage {stage.number}"] = metrics
        carry_over(model, stage, joint, STAGES[2])
    say("Stage 3: both levels")
    rows["before stage 3"] = evaluate(joint, processor, test_set)
    runs.append(_train_stage(joint, STAGES[2], processor, train_set, settings, seed))
    rows["after stage 3"] = evaluate(joint, processor, test_set)

    report = {
        "seed": seed,
        "settings": asdict(settings),
        "metrics": {name: metrics.as_dict() for name, metrics in rows.items()},
        "seconds": {each.name: round(each.seconds, 1) for each in runs},
        "threads": torch.get_num_threads(),
    }
    # First, so that a directory with any of the files is known as a quickstart's.
    report["seconds"]["total"] = round(time.perf_counter() - start, 1)
    write_json(output_dir / _METRICS, report, indent=2)
    _write(output_dir, joint, processor, test_set, easy_scenes(2 * seed + 1, _SHOWN_SIZE), runs, rows)
    report["seconds"]["total"] = round(time.perf_counter() - start, 1)
    write_json(output_dir / _METRICS, report, indent=2)
    say(f"\n{format_table(rows)}\n\n{report['seconds']['total']:.0f} seconds in all; written to {output_dir}:")
    for path in sorted(output_dir.glob("[!.]*")):  # not the lock, which goes with the run
        say(f"  {path.name}")
    return report


def _train_standins(
    vision: LionForCausalLM,
    language: LionForCausalLM,
    processor: LionProcessor,
    train_set: SceneSet,
    settings: Settings,
    seed: int,
) -> tuple[Run, Run]:
    """Train the vision tower of one model and the language model of another."""

    def see() -> Run:
        rng = _seeded(seed, "vision")
        steps, batch_size = settings.vision_steps, settings.vision_batch_size
        return train_vision(vision.vision_model, train_set, steps=steps, batch_size=batch_size, rng=rng)

    def speak() -> tuple[dict[str, Tensor], Run]:
        rng = _seeded(seed, "language")
        steps, batch_size = settings.language_steps, settings.language_batch_size
        run = train_language(language, processor, train_set, steps=steps, batch_size=batch_size, rng=rng)
        return language.language_model.state_dict(), run

    seeing, (state, speaking) = side_by_side(see, speak)
    language.language_model.load_state_dict(state)
    return seeing, speaking


def _seeded(seed: int, name: str) -> np.random.Generator:
    """Return a generator for one part of the training, and seed torch's, independently of parts in parallel."""
    rng = np.random.default_rng([seed, *name.encode()])
    torch.manual_seed(int(rng.integers(2**63)))
    return rng


def _train_stage(
    model: LionForCausalLM,
    stage: Stage,
    processor: LionProcessor,
    train_set: SceneSet,
    settings: Settings,
    seed: int,
) -> Run:
    freeze_for_stage(model, stage)
    number, kinds = stage.number, KINDS[stage.number]
    batches = training_batches(processor, train_set, kinds, settings.batch_size, _seeded(seed, stage.name))
    steps = settings.stage_steps[number - 1]
    rates = {"muon_lr": MUON_LR[number], "adamw_lr": ADAMW_LR[number]}
    return train_lion(f"stage {number}", model, kinds, batches, steps, **rates)


def _write(
    output_dir: Path,
    model: LionForCausalLM,
    processor: LionProcessor,
    test_set: SceneSet,
    large: SceneGenerator,
    runs: list[Run],
    rows: dict[str, Metrics],
) -> None:
    model.generation_config.update(num_beams=1, repetition_penalty=1.0, max_new_tokens=48)
    checkpoint = output_dir / "checkpoint"
    aside = output_dir / f".checkpoint{UNFINISHED}"
    with naming_output(checkpoint), whole_directory(checkpoint, aside=aside) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    indices = range(min(_SHOWN, len(test_set)))
    captions = [test_set.samples(i, "caption")[0] for i in indices]
    expressions = [test_set.samples(i, "rec")[-1 - i % 2] for i in indices]
    told, _ = answer(model, processor, test_set, indices, captions)
    located, _ = answer(model, processor, test_set, indices, expressions)
    pieces = [Showpiece(large[i], told[i], expressions[i], located[i]) for i in indices]
    draw_grid(pieces, output_dir / "predictions.png")
    draw_curves(runs, output_dir / "losses.png")
    write_text(output_dir / "table.txt", format_table(rows) + "\n")


def _expect_own(output_dir: Path) -> None:
    """Check that a directory holds none of the files to write, except an earlier quickstart's.

    Raises:
        ValueError: it does.
    """
    present = [name for name in _FILES if os.path.lexists(output_dir / name)]
    if not present:
        return
    try:
        earlier = json.loads(read_content(output_dir / _METRICS)).keys() >= {"seed", "settings", "metrics"}
    except (FileNotFoundError, IsADirectoryError, ValueError, AttributeError, RecursionError):
        earlier = False
    if not earlier:
        raise ValueError(
            f"output_dir: expected the directory of an earlier quickstart, or one without {present[0]}, got "
            f"{output_dir}, which has no {_METRICS} of a quickstart"
        )
