"""The whole of LION's training on two CPU cores in minutes, with nothing downloaded."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.quickstart.data import SceneSet, compute_features, render, training_batches
from lion_fast.quickstart.evaluation import Metrics, answer, evaluate
from lion_fast.quickstart.loop import Run, train
from lion_fast.quickstart.models import IMAGE_SIZE, build_config, build_processor
from lion_fast.quickstart.muon import build_optimizers
from lion_fast.quickstart.report import Showpiece, draw_curves, draw_grid, format_table
from lion_fast.quickstart.standins import train_language, train_vision
from lion_fast.scenes import SceneGenerator
from lion_fast.stages import STAGES, Stage, carry_over, freeze_for_stage

_KINDS = {1: ("caption", "vqa"), 2: ("rec",), 3: ("caption", "rec", "vqa", "rec")}
_SHOWN, _SHOWN_SIZE = 8, 384


@dataclass(frozen=True)
class Settings:
    """How much of everything; the defaults take under ten minutes on two cores."""

    train_scenes: int = 6000
    test_scenes: int = 250
    vision_steps: int = 1400
    vision_batch_size: int = 32
    language_steps: int = 620
    language_batch_size: int = 128
    stage_steps: tuple[int, int, int] = (220, 200, 170)
    batch_size: int = 64

    def scaled(self, factor: float) -> "Settings":
        """The same with `factor` times the steps."""

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
    """Train LION's three stages on scenes and show what each has brought.

    Written to `output_dir`: `checkpoint/` (loads with `LionForCausalLM.from_pretrained` and
    `LionProcessor.from_pretrained`), `predictions.png`, `losses.png`, `table.txt` and `metrics.json`.

    Args:
        output_dir: made if it is not there; files of an earlier run are overwritten.
        seed: names the scenes and the weights at the start.
        scale: factor on the number of steps everywhere.
        smoke: every step in seconds, without learning anything.
        show: print the progress, the table and where the files lie.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: for a `scale` that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale: expected a positive factor, got {scale}")
    settings = SMOKE if smoke else Settings().scaled(scale)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    say = print if show else _silence
    start = time.perf_counter()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)

    say("Scenes: coloured shapes and signs, with captions, questions and boxes")
    processor = build_processor()
    train_set = render(_scenes(2 * seed), settings.train_scenes, processor, "training scenes")
    test_set = render(_scenes(2 * seed + 1), settings.test_scenes, processor, "unseen scenes")

    say("Step 0: stand-ins for EVA and Flan-T5, frozen from here on")
    models = [LionForCausalLM(build_config(processor, stage.visual_input)) for stage in STAGES]
    joint = models[-1]
    steps, batch_size = settings.vision_steps, settings.vision_batch_size
    runs = [train_vision(joint.vision_model, train_set, steps=steps, batch_size=batch_size, rng=rng)]
    for scene_set in (train_set, test_set):
        compute_features(joint, scene_set)
    _copy_frozen(joint, models[0])
    steps, batch_size = settings.language_steps, settings.language_batch_size
    runs.append(train_language(models[0], processor, train_set, steps=steps, batch_size=batch_size, rng=rng))
    for model in models[1:]:
        _copy_frozen(models[0], model)

    rows = {"before stage 1": evaluate(joint, processor, test_set)}
    for stage, model in zip(STAGES[:2], models[:2], strict=True):
        say(f"Stage {stage.number}: {stage.name.replace('_', ' ')}")
        runs.append(_train_stage(model, stage, processor, train_set, settings, rng))
        rows[f"after stage {stage.number}"] = evaluate(model, processor, test_set)
        carry_over(model, stage, joint, STAGES[2])
    say("Stage 3: both")
    rows["before stage 3"] = evaluate(joint, processor, test_set)
    runs.append(_train_stage(joint, STAGES[2], processor, train_set, settings, rng))
    rows["after stage 3"] = evaluate(joint, processor, test_set)

    report = {
        "seed": seed,
        "settings": asdict(settings),
        "metrics": {name: metrics.as_dict() for name, metrics in rows.items()},
        "seconds": {each.name: round(each.seconds, 1) for each in runs},
        "threads": torch.get_num_threads(),
    }
    _write(output_dir, joint, processor, test_set, _scenes(2 * seed + 1, _SHOWN_SIZE), runs, rows)
    report["seconds"]["total"] = round(time.perf_counter() - start, 1)
    (output_dir / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    say(f"\n{format_table(rows)}\n\n{report['seconds']['total']:.0f} seconds in all; written to {output_dir}:")
    for path in sorted(output_dir.iterdir()):
        say(f"  {path.name}")
    return report


def _scenes(seed: int, image_size: int = IMAGE_SIZE) -> SceneGenerator:
    """Scenes that a model of a few hundred thousand parameters can learn in minutes: one or two objects, few signs."""
    return SceneGenerator(seed, image_size, num_objects=(1, 2), text_rate=0.1)


def _train_stage(
    model: LionForCausalLM,
    stage: Stage,
    processor: LionProcessor,
    train_set: SceneSet,
    settings: Settings,
    rng: np.random.Generator,
) -> Run:
    freeze_for_stage(model, stage)
    model.train()
    matrices = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and _is_map(n)]
    optimizers = build_optimizers([model], matrices)
    kinds, layers = _KINDS[stage.number], len(model.config.feature_layers)
    batches = training_batches(processor, train_set, kinds, settings.batch_size, rng)
    losses = (model(**{**batch, "vision_features": batch["vision_features"][:, :layers]}).loss for batch in batches)
    return train(f"stage {stage.number}", kinds, losses, optimizers, settings.stage_steps[stage.number - 1])


def _is_map(name: str) -> bool:
    """Whether a matrix maps vectors to vectors; embeddings and the routers' tables do not."""
    return "embeddings" not in name and "router" not in name


@torch.no_grad()
def _copy_frozen(source: LionForCausalLM, target: LionForCausalLM) -> None:
    """Copy what no stage trains: the vision tower and the language model's own weights."""
    parameters = dict(target.named_parameters())
    for name, value in source.named_parameters():
        if not any(stage.trains(name) for stage in STAGES):
            parameters[name].copy_(value)


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
    model.save_pretrained(output_dir / "checkpoint")
    processor.save_pretrained(output_dir / "checkpoint")
    indices = range(min(_SHOWN, len(test_set)))
    captions = [test_set.samples(i, "caption")[0] for i in indices]
    places = [test_set.samples(i, "rec")[-1 - i % 2] for i in indices]
    told = answer(model, processor, test_set, indices, captions)
    located = answer(model, processor, test_set, indices, places)
    pieces = [Showpiece(large[i], told[i], places[i], located[i]) for i in indices]
    draw_grid(pieces, output_dir / "predictions.png")
    draw_curves(runs, output_dir / "losses.png")
    (output_dir / "table.txt").write_text(format_table(rows) + "\n")


def _silence(*_: object) -> None:
    pass
