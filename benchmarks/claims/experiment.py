"""Training and evaluation of every arm for every seed, with one result file each, so that a rerun resumes."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.claims.arms import ARMS, BLUR, IMAGE_KINDS, TRAINED_WRONG, WRONG_RATES, Arm, accuracy_name, noisy_tags
from benchmarks.claims.reading import teach_tags, with_tag_sentence
from benchmarks.claims.report import MAX_SEEDS, REPORT_FILES, write_report
from lion_fast.extras import require
from lion_fast.io.atomic import whole_directory, write_json
from lion_fast.io.reading import read_content
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.quickstart.data import SceneSet, compute_features, easy_scenes, render, training_batches
from lion_fast.quickstart.evaluation import accuracy
from lion_fast.quickstart.loop import train_lion
from lion_fast.quickstart.models import build_config
from lion_fast.training.stages import STAGES, carry_over, copy_frozen, freeze_for_stage

# Scenes used neither for the quickstart's stand-ins nor for its learning rates.
_TRAIN_SCENES, _TEST_SCENES = 100, 101
_SAMPLES_PER_SCENE = {"caption": 1, "vqa": 2, "rec": 2}  # samples of a kind per scene


@dataclass(frozen=True)
class Settings:
    """The sizes of the experiment; stages 1 and 2 have equal steps, so that mixed data can be half and half."""

    train_scenes: int = 12000
    test_scenes: int = 400
    stage_steps: tuple[int, int, int] = (300, 300, 160)
    reader_steps: int = 480
    batch_size: int = 32


SMOKE = Settings(train_scenes=16, test_scenes=4, stage_steps=(2, 2, 4), reader_steps=8, batch_size=4)


def run(
    output_dir: str | Path,
    frozen_from: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Train every arm for every seed, and write the results as `claims.json`, `claims.md` and `images/claims.png`.

    Each arm's result for a seed is a file under `arms/`; arms with a file are not trained again.

    Args:
        output_dir: created if missing.
        frozen_from: a checkpoint of the quickstart, whose stand-ins all arms share.
        seeds: for initial weights, data order and wrong tags; at least two, to estimate the spread.
        settings: `Settings()` if None.

    Returns:
        The content of `claims.json`.

    Raises:
        ValueError: too few or too many seeds, a checkpoint of other sizes, or results in `output_dir` of other
            settings or stand-ins.
        OSError: there is no checkpoint.
        MissingExtraError: matplotlib is not installed.
    """
    require("quickstart", "matplotlib")  # needed for the chart at the end
    if len(set(seeds)) != len(seeds) or not 2 <= len(seeds) <= MAX_SEEDS:
        raise ValueError(f"seeds: expected 2 to {MAX_SEEDS} different ones, got {list(seeds)}")
    output_dir = Path(output_dir)
    experiment = Experiment(output_dir, frozen_from, settings or Settings())
    results = []
    for seed in seeds:
        for arm in ARMS:
            result = experiment.result(arm, seed)
            print(f"seed {seed}, {arm.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in result["accuracy"].items()))
            results.append(result)
    report = {"seeds": list(seeds), **experiment.identity, "results": results}
    write_report(output_dir, report)
    print(f"written to {output_dir}: claims.md, claims.json, images/claims.png")
    return report


def _expect_unused(output_dir: Path) -> None:
    """Check that a directory without the record of an experiment has none of its other files.

    Raises:
        ValueError: it has one.
    """
    for name in ("arms", "checkpoints", *REPORT_FILES):
        if os.path.lexists(output_dir / name):
            raise ValueError(
                f"output_dir: expected a directory without {name}, or with the identity.json of an experiment, got "
                f"{output_dir}"
            )


def _read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none; the message names the file.
    """
    try:
        return json.loads(read_content(path))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error


class Experiment:
    """The stand-ins, the scenes with their features, and the arms' results.

    Args:
        output_dir, frozen_from, settings: see `run`.

    Raises:
        ValueError: `output_dir` holds results of other settings or stand-ins, or files of the same names that no
            experiment wrote.
        FileNotFoundError: there is no checkpoint.
    """

    def __init__(self, output_dir: Path, frozen_from: str | Path, settings: Settings):
        if not (Path(frozen_from) / "config.json").is_file():
            raise FileNotFoundError(f"{frozen_from}: no checkpoint there; `lion-fast quickstart` makes one")
        self.output_dir, self.settings = output_dir, settings
        self.processor = LionProcessor.from_pretrained(frozen_from)
        self.frozen: LionForCausalLM = LionForCausalLM.from_pretrained(frozen_from)
        # Converted to JSON's types, for comparison with the files.
        self.identity = json.loads(json.dumps({"settings": asdict(settings), "stand_ins": _digest(self.frozen)}))
        path = output_dir / "identity.json"
        if not path.exists():
            _expect_unused(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, self.identity)
        (output_dir / "arms").mkdir(exist_ok=True)
        if (written := _read_json(path)) != self.identity:
            raise ValueError(f"output_dir: expected one of {self.identity}, got {output_dir} with results of {written}")

    @cached_property
    def train_set(self) -> SceneSet:
        scenes = easy_scenes(_TRAIN_SCENES, text_rate=0.25)
        return self._with_features(render(scenes, self.settings.train_scenes, self.processor, "training scenes"))

    @cached_property
    def test_set(self) -> SceneSet:
        scenes = easy_scenes(_TEST_SCENES)
        return self._with_features(render(scenes, self.settings.test_scenes, self.processor, "unseen scenes"))

    @cached_property
    def _blurred(self) -> tuple[SceneSet, SceneSet]:
        """Return both sets of scenes with blurred features of the last layer."""
        generator = torch.Generator().manual_seed(0)
        blurred = []
        for scene_set in (self.train_set, self.test_set):
            assert scene_set.features is not None
            seen = scene_set.features[:, :1].float()
            noise = BLUR * seen.std((0, 1, 2)) * torch.randn(seen.shape, generator=generator)
            blurred.append(replace(scene_set, features=(seen + noise).half()))
        return blurred[0], blurred[1]

    def _sets_of(self, arm: Arm) -> tuple[SceneSet, SceneSet]:
        """Return the scenes for training and evaluation as the arm sees them."""
        return self._blurred if arm.blurred else (self.train_set, self.test_set)

    def _with_features(self, scene_set: SceneSet) -> SceneSet:
        compute_features(self.frozen, scene_set)
        return scene_set

    @cached_property
    def reader(self) -> LionForCausalLM:
        """A model whose language stand-in can read tags, the same for all seeds."""
        path = self._checkpoint("reader")
        if path.is_dir():
            return LionForCausalLM.from_pretrained(path)
        torch.manual_seed(0)
        model = LionForCausalLM(build_config(self.processor, "QFORMER"))
        copy_frozen(self.frozen, model)
        settings = {"steps": self.settings.reader_steps, "batch_size": self.settings.batch_size}
        teach_tags(model, self.processor, self.train_set, **settings, rng=np.random.default_rng(0))
        _save(model, path)
        return model

    def result(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Return the arm's result for a seed; train and evaluate it first if there is no file."""
        path = self.output_dir / "arms" / f"{arm.name}-seed{seed}.json"
        if not path.is_file():
            write_json(path, self._train_and_measure(arm, seed))
        return _read_json(path)

    def build(self, arm: Arm, seed: int) -> LionForCausalLM:
        """Return the arm's model before training, with gradients enabled for the trained parts."""
        torch.manual_seed(seed)
        config = build_config(self.processor, arm.stage.visual_input)
        if arm.shares_adapter:
            config.num_adapters, config.adapter_rank = 1, 2 * config.adapter_rank
        model = LionForCausalLM(config)
        copy_frozen(self.reader if arm.reads_tags else self.frozen, model)
        for earlier in (each for each in ARMS if each.name in arm.after):
            trained = LionForCausalLM.from_pretrained(self._checkpoint(f"{earlier.name}-seed{seed}"))
            carry_over(trained, earlier.stage, model, arm.stage)
        freeze_for_stage(model, arm.stage)
        for name, parameter in model.named_parameters():
            if not arm.routed and ".router_ratio" in name:
                torch.nn.init.ones_(parameter.requires_grad_(False))
            if not arm.aggregates and name.startswith("aggregator."):
                parameter.requires_grad_(False)
        return model

    def _checkpoint(self, name: str) -> Path:
        return self.output_dir / "checkpoints" / name

    def _train_and_measure(self, arm: Arm, seed: int) -> dict[str, Any]:
        start = time.process_time()
        model = self.build(arm, seed)
        train_set, _ = self._sets_of(arm)
        steps = sum(self.settings.stage_steps[number - 1] for number in arm.steps)
        # All arms of a stage have the same scenes and questions in the same order, with any tags.
        rng = np.random.default_rng([seed, *arm.stage.name.encode()])
        batches = training_batches(
            self._processor(arm),
            train_set,
            arm.kinds,
            self.settings.batch_size,
            rng,
            tag_rate=0.0 if arm.tag_sentence is None else 1.0,
            tags=self._tags(arm, TRAINED_WRONG, (seed, _TRAIN_SCENES), train_set),
        )
        training = train_lion(f"seed {seed}, {arm.name}", model, arm.kinds, batches, steps, **arm.learning_rates)
        if any(arm.name in other.after for other in ARMS):
            _save(model, self._checkpoint(f"{arm.name}-seed{seed}"))
        turns = [arm.kinds[step % len(arm.kinds)] in IMAGE_KINDS for step in range(steps)]
        return {
            "arm": arm.name,
            "seed": seed,
            "accuracy": self._accuracy(arm, seed, model),
            "last_loss": float(np.mean(training.losses[-20:])),
            "image_level_samples": self.settings.batch_size * sum(turns),
            "region_level_samples": self.settings.batch_size * (steps - sum(turns)),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "cpu_seconds": round(time.process_time() - start, 1),
        }

    def _processor(self, arm: Arm) -> LionProcessor:
        return self.processor if arm.tag_sentence is None else with_tag_sentence(self.processor, arm.tag_sentence)

    def _tags(self, arm: Arm, wrong: float, seed: Sequence[int], scene_set: SceneSet) -> list[str] | None:
        """Return one string per scene; None for an arm without tags."""
        return None if arm.tag_sentence is None else noisy_tags(scene_set, wrong, seed)

    def _accuracy(self, arm: Arm, seed: int, model: LionForCausalLM) -> dict[str, float]:
        """Return the share of correct answers on unseen scenes, by kind and share of wrong tags."""
        _, test_set = self._sets_of(arm)
        processor, shares = self._processor(arm), {}
        for wrong in (0.0,) if arm.tag_sentence is None else WRONG_RATES:
            tags = self._tags(arm, wrong, (seed, _TEST_SCENES), test_set)
            for kind in arm.measured:
                asked = (kind, _SAMPLES_PER_SCENE[kind], np.random.default_rng(0))
                shares[accuracy_name(kind, wrong if tags else None)] = accuracy(
                    model, processor, test_set, *asked, tags
                )
        return shares


def _save(model: LionForCausalLM, path: Path) -> None:
    """Write a checkpoint atomically."""
    with whole_directory(path) as unfinished:
        model.save_pretrained(unfinished)


def _digest(model: LionForCausalLM) -> str:
    """Return a digest of the frozen parts' weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not any(stage.trains(name) for stage in STAGES):
            digest.update(name.encode())
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:16]
