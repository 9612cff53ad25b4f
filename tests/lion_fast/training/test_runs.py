"""Runs in this process: the stages, the golden curve, exactness, non-finite losses, damaged checkpoints."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from lion_fast import LionForCausalLM, LionProcessor
from lion_fast.data.order import POSITION
from lion_fast.training import NonFiniteError, saving, shipped_recipe, train
from lion_fast.training.building import build_model
from lion_fast.training.data import SAMPLE_IDS, SceneSamples
from lion_fast.training.evaluation import evaluate
from tests.extras import needing
from tests.lion_fast.training.runs import MakeRecipe, losses_of, weights_of
from tests.rounding import LOSS_TWO_WAYS, expect_golden_curve


@needing("tensorboard", "train")
def test_the_command_trains_the_stages_and_carries_over(tiny_lion: Path, tmp_path: Path, run_cli: Callable) -> None:
    """Stages 1 and 2 start from frozen parts, stage 3 from both and stage 4 from 3, in bf16 with checkpointing."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {workers: 0}\nbatch: {size: 4, per_process: 2}\nsteps: 2\ngradient_checkpointing: true\n"
        "optimizer: {lr: 1e-2, min_lr: 1e-2, warmup_steps: 0}\nlog_every: 1\n"
        "evaluation: {every: 2, samples: 3, pictures: 2, max_new_tokens: 3}\n"
    )
    image, region = (f"data.train.{task}=[scenes:0:4]" for task in ("image_level", "region_level"))
    model = {number: tmp_path / f"stage{number}" / "model" for number in (1, 2, 3, 4)}
    starts = {
        1: [f"model.frozen_from={tiny_lion}", image, "data.evaluate.image_level=[scenes:1:3]"],
        2: [f"model.frozen_from={tiny_lion}", region],
        3: [f"model.carry_over=[{model[1]}, {model[2]}]", image, region],
        4: [f"model.carry_over=[{model[3]}]", image, region, "optimizer.min_lr=0.0"],
    }
    for number, start in starts.items():
        argv = [f"output_dir={tmp_path / f'stage{number}'}", *start, "--stage", number, "--config", config]
        status, _, err = run_cli("train", *argv)
        assert status == 0, err
    states = {number: load_file(path / "model.safetensors") for number, path in model.items()}
    base = load_file(tiny_lion / "model.safetensors")
    joint = LionForCausalLM.from_pretrained(model[4])
    name = "language_model.encoder.block.0.layer.1.adapter.adapters.{}.down_proj.weight"
    for number, single in ((1, 1), (2, 0)):
        # A step of AdamW moves a weight by about the learning rate, 1e-2; stage 3 takes two steps from stage 1 or 2.
        assert (states[3][name.format(single)] - states[number][name.format(0)]).abs().max() < 0.025
        assert (states[3][name.format(1 - single)] - states[number][name.format(0)]).abs().max() > 0.1
        assert not torch.equal(states[3][name.format(single)], states[number][name.format(0)])
    for frozen in ("vision_model.pos_embed", "language_model.encoder.block.0.layer.0.SelfAttention.q.weight"):
        assert torch.equal(states[4][frozen].float(), base[frozen].to(torch.bfloat16).float()), frozen
    assert not torch.equal(states[1]["query_tokens"], base["query_tokens"])
    assert joint.config.visual_input == "ALL"
    sheet = Image.open(tmp_path / "stage1" / "pictures" / "step-2.png")
    assert sheet.size[0] > 640
    assert list((tmp_path / "stage1" / "tensorboard").iterdir())
    status, _, err = run_cli("train", *argv)
    assert status == 2
    assert "output_dir: expected a directory without checkpoints" in err


@needing("tensorboard", "train")
def test_the_command_reports_errors_in_one_line(tmp_path: Path, run_cli: Callable) -> None:
    argv = ["train", "--stage", "1", f"output_dir={tmp_path}"]
    status, out, _ = run_cli(*argv, "--print-recipe")
    assert (status, out) == (0, shipped_recipe(1))
    for more, message in (
        ([], "model: expected a directory in model.frozen_from or model.carry_over, got neither"),
        (["model.carry_over=[absent]", "data.train.image_level=[scenes:0:1]"], "absent: no such directory"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ):
        status, _, err = run_cli(*argv, *more)
        assert status == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1


@needing("tensorboard", "train")
def test_an_interrupt_ends_the_command(
    make_recipe: MakeRecipe, tmp_path: Path, run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    settings = [f"{key}={value}" for key, value in (("output_dir", tmp_path / "run"), ("model.carry_over", "[x]"))]
    argv = ["train", "--stage", "1", *settings, "data.train.image_level=[scenes:0:2]"]
    for name in ("lion_fast.training.run.build_model", "argparse.ArgumentParser.parse_args"):
        monkeypatch.setattr(name, interrupt)
        assert run_cli(*argv)[0] == 130
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["recipe.yaml", "trained_on.json"]


def test_a_run_without_tensorboard_warns(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    recipe = make_recipe(3, "steps=2")
    train(recipe)
    assert "no package tensorboard; install it with: pip install 'lion-fast[train]'" in caplog.text
    assert not (Path(recipe.output_dir) / "tensorboard").exists()
    assert len(losses_of(recipe.output_dir)) == 2


class GoldenSamples(Dataset):
    """Placeholders of the golden batch's samples: task and index."""

    def __init__(self, task: str):
        self.task = task

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"task": self.task, "index": index}


def test_training_reproduces_the_golden_curve(
    golden: Any, golden_batch: Callable[[str], dict[str, Tensor]], converted: Path, make_recipe: MakeRecipe
) -> None:
    """Losses agree up to rounding (`tests/rounding.py`)."""

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        assert [sample["index"] for sample in samples] == [0, 1, 2, 3]
        ids = [sample["id"] for sample in samples]
        return {**golden_batch(samples[0]["task"]), SAMPLE_IDS: ids, POSITION: samples[0][POSITION]}

    expected, settings = golden.meta["adamw"]["losses"], golden.meta["adamw"]
    recipe = make_recipe(
        3,
        *(f"model.carry_over=['{converted}']", "model.dropout=0.0", "data.shuffle=false", "data.mix=step"),
        *(f"optimizer.{name}={settings['lr']}" for name in ("lr", "min_lr", "warmup_lr")),
        *("optimizer.warmup_steps=0", "optimizer.clip=0.0", f"optimizer.weight_decay={settings['weight_decay']}"),
        *("batch.per_process=4", f"steps={len(expected)}", "checkpoints.every=100"),
    )
    samples = {task: GoldenSamples(task) for task in ("image_level", "region_level")}
    train(recipe, train_samples=samples, data_collator=collate)
    losses = losses_of(recipe.output_dir)
    expect_golden_curve(losses, expected)


def test_accumulated_and_checkpointed_steps_equal_the_whole_batch(make_recipe: MakeRecipe) -> None:
    """A relative rounding of 1e-7 in a gradient changes a step of AdamW as much; six steps add up to at most 1e-5."""
    curves = {}
    for name, settings in {
        "whole": ("batch.per_process=4",),
        "halves": ("batch.per_process=2",),
        "ones, checkpointed": ("batch.per_process=1", "gradient_checkpointing=true"),
    }.items():
        recipe = make_recipe(3, "model.dropout=0.0", *settings, name=name)
        train(recipe)
        curves[name] = losses_of(recipe.output_dir)
    assert curves["whole"][0] != curves["whole"][-1]
    for curve in curves.values():
        assert curve == pytest.approx(curves["whole"], rel=LOSS_TWO_WAYS)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_non_finite_loss_is_reported(make_recipe: MakeRecipe, action: str) -> None:
    from lion_fast.training.data import LionCollator

    recipe = make_recipe(1, f"on_nonfinite={action}", "data.shuffle=false", "batch.size=2", "steps=4")
    _, processor = build_model(recipe)
    plain = LionCollator(processor)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = plain(samples)
        for index, sample_id in enumerate(batch[SAMPLE_IDS]):
            if sample_id.endswith(":2"):
                batch["pixel_values"][index] = float("nan")
        return batch

    seen: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append({name: value.detach().clone() for name, value in model.named_parameters()})

    report = Path(recipe.output_dir) / "nonfinite" / "step-2.json"
    if action == "stop":
        with pytest.raises(NonFiniteError, match=r"step 2: loss not finite, samples scenes:0:7:2, scenes:0:7:3"):
            train(recipe, data_collator=collate, callbacks=[Look()])
        assert len(seen) == 1
    else:
        train(recipe, data_collator=collate, callbacks=[Look()])
        assert all(torch.equal(seen[0][name], value) for name, value in seen[1].items())
        assert any(not torch.equal(seen[1][name], value) for name, value in seen[2].items())
        assert all(torch.isfinite(value).all() for value in weights_of(recipe.output_dir).values())
    assert json.loads(report.read_text())["batches"][0] == {"samples": ["scenes:0:7:2", "scenes:0:7:3"], "loss": "nan"}


def test_evaluation_weights_the_loss_by_tokens(tiny_lion: Path) -> None:
    model = LionForCausalLM.from_pretrained(tiny_lion).eval()
    processor = LionProcessor.from_pretrained(tiny_lion)
    samples = torch.utils.data.ConcatDataset([SceneSamples("image_level", 0, 3), SceneSamples("region_level", 0, 4)])
    results = [
        evaluate(
            model,
            processor,
            samples,
            indices=range(7),
            batch_size=batch_size,
            device=torch.device("cpu"),
            pictures=7,
            autocast=torch.no_grad,
            num_beams=1,
            max_new_tokens=3,
        )
        for batch_size in (1, 3, 7)
    ]
    for metrics, shown in results:
        assert len(shown) == 7
        # float32 sums in different orders
        assert metrics["loss"] == pytest.approx(results[0][0]["loss"], rel=LOSS_TWO_WAYS)
        assert set(metrics) == {"loss", "exact_match", "grounding_accuracy"}


def test_a_damaged_checkpoint_is_skipped(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(3, "checkpoints.keep=3")
    train(recipe)
    run_dir = Path(recipe.output_dir)
    expected, curve = weights_of(run_dir), losses_of(run_dir)
    newest, middle, oldest = saving.checkpoints(run_dir)
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    assert saving.damage(newest) == "optimizer.pt does not hold what was written"
    (middle / "trainer_state.json").unlink()
    assert saving.damage(middle) == "trainer_state.json is missing"
    assert saving.last_complete(run_dir) == oldest
    train(recipe, resume=True)
    assert f"resuming from {oldest}" in capsys.readouterr().out
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(run_dir).items())
    assert losses_of(run_dir) == curve
    (run_dir / "checkpoint-6" / saving.SEAL).write_text("{")
    assert "cannot be read" in str(saving.damage(run_dir / "checkpoint-6"))
