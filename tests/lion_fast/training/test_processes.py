"""Runs give the same results after kills and full disks, and on any number of processes."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_fast import LionForCausalLM
from lion_fast.training import RecipeError, saving, train
from lion_fast.training.recipe import Recipe
from tests.lion_fast.processes import PATIENCE, finish, free_port
from tests.lion_fast.training.runs import Files, MakeRecipe, losses_of, run_on, wait_for, weights_of
from tests.rounding import LOSS_TWO_WAYS, TWO_WAYS


def test_kills_change_nothing(make_recipe: MakeRecipe, start: Callable[..., Any], files: Files, tmp_path: Path) -> None:
    """A run survives twenty SIGKILLs: half at the start of a file operation, half at any moment after one.

    Samples come from files, augmented and grouped by length; the undisturbed run loads them in two workers.
    """
    rng = random.Random(0)
    whole = make_recipe(3, *files.overrides(), "steps=40", "data.workers=2", name="whole")
    finish(start(whole, count_to=str(tmp_path / "count")))
    operations = int((tmp_path / "count").read_text())
    assert operations > 20 * 10, "twenty checkpoints of ten files or more"
    killed = make_recipe(3, *files.overrides(), "steps=40", name="killed")
    began_at = set()
    for number in range(20):
        operation, said = rng.randint(1, operations // 8), tmp_path / f"said-{number}"
        if number % 2:
            process = start(killed, resume=True, kill_at=operation)
        else:  # killed by this process at an arbitrary moment; `hold_at` keeps it from ending first
            process = start(killed, resume=True, said_at=(operation, str(said)), hold_at=operation + 5)
            wait_for(said, process)
            process.kill()
        process.join()
        assert process.exitcode == -9
        began_at.add(saving.last_complete(Path(killed.output_dir)))
    assert len(began_at) > 3, "kills came before any progress"
    finish(start(killed, resume=True))
    expected = weights_of(whole.output_dir)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(killed.output_dir).items())
    assert losses_of(killed.output_dir) == losses_of(whole.output_dir)
    assert not (Path(killed.output_dir) / saving.ASIDE / "checkpoint-40").exists()


@pytest.mark.parametrize("engine", ["trainer", "fsdp2"])
def test_a_full_disk_leaves_the_last_checkpoint(
    make_recipe: MakeRecipe, start: Callable[..., Any], tmp_path: Path, engine: str
) -> None:
    recipe = make_recipe(3, "steps=4")
    group: dict[str, Any] = {"engine": engine}
    group |= {"rank": 0, "port": free_port()} if engine == "fsdp2" else {}
    finish(start(replace(recipe, output_dir=str(tmp_path / "whole"))))  # a process of one thread, like all the others
    size = (tmp_path / "whole" / "model" / "model.safetensors").stat().st_size
    process = start(recipe, file_limit=size // 4, error_to=str(tmp_path / "error"), **group)
    process.join(timeout=PATIENCE)
    assert process.exitcode == 1
    assert "checkpoint-2: cannot be written" in (tmp_path / "error").read_text()
    assert saving.checkpoints(Path(recipe.output_dir)) == []
    finish(start(recipe, resume=True, **group))
    assert_same_model(Path(recipe.output_dir), tmp_path / "whole")
    if engine == "trainer":
        expected = weights_of(tmp_path / "whole")
        assert all(torch.equal(value, expected[name]) for name, value in weights_of(recipe.output_dir).items())


def test_two_processes_match_one(make_recipe: MakeRecipe, start: Callable[..., Any], files: Files) -> None:
    """DDP and FSDP2 on two gloo processes match one process; sharded checkpoints load on 2, 1 and again 2 processes.

    Dropout is on, because its seeds follow the samples. The tolerance is 1e-5, as for accumulation, because sums over
    processes have another order.
    """
    # Five samples in batches of two: one process runs out of samples before the other.
    evaluation = (*files.overrides(), "data.evaluate.image_level=['scenes:1:5']", "evaluation.every=6")
    one = make_recipe(3, *evaluation, name="one")
    train(one)
    two = make_recipe(3, *evaluation, name="two")
    run_on(2, start, two)
    expect_same_losses(two, one)
    sharded = make_recipe(3, *files.overrides(), "checkpoints.keep=1", name="sharded")
    for world, until in ((2, 2), (1, 4), (2, 6)):
        run_on(world, start, sharded, engine="fsdp2", resume=True, stop_after=until)
    progress = saving.checkpoints(Path(sharded.output_dir))[0] / "progress.json"
    expected = losses_of(one.output_dir)
    assert json.loads(progress.read_text())["losses"] == pytest.approx(expected, rel=LOSS_TWO_WAYS)
    assert_same_model(Path(sharded.output_dir), Path(one.output_dir))


def test_sharded_trainer_matches_one_process(make_recipe: MakeRecipe, start: Callable[..., Any], files: Files) -> None:
    """Trainer with FSDP2 matches one process to 1e-5, resumes on 1 and 2 processes, and saves a complete model.

    The evaluation splits five samples among two processes in batches of two.
    """
    settings = (*files.overrides(), "data.evaluate.image_level=['scenes:1:5']", "evaluation.every=6")
    train(one := make_recipe(3, *settings, name="one"))
    sharded = make_recipe(3, *settings, "parallel=fsdp", name="sharded")
    run_on(2, start, sharded)
    run_dir = Path(sharded.output_dir)
    for world in (1, 2):
        expect_same_losses(sharded, one)
        assert_same_model(run_dir, Path(one.output_dir))
        saving.remove(run_dir / "checkpoint-6")
        run_on(world, start, sharded, resume=True)
    expect_same_losses(sharded, one)
    model = LionForCausalLM.from_pretrained(run_dir / "model", output_loading_info=True)
    assert not any(model[1].values()), "the final save has all weights and no others"
    with pytest.raises(RecipeError, match=r"parallel: expected 'ddp' without torchrun"):
        train(make_recipe(3, "parallel=fsdp", name="alone"))


def test_sharded_bf16_matches_one_process(make_recipe: MakeRecipe, start: Callable[..., Any]) -> None:
    """Parameters are gathered in bfloat16, including norms: losses agree to bfloat16's rounding."""
    settings = ("precision=bf16", "model.dropout=0.0", "steps=2", "checkpoints.every=2")
    train(one := make_recipe(3, *settings, name="one"))
    sharded = make_recipe(3, *settings, "parallel=fsdp", name="sharded")
    run_on(2, start, sharded)
    expected = losses_of(one.output_dir)
    assert losses_of(sharded.output_dir) == pytest.approx(expected, rel=2e-3)
    dtypes = {name: value.dtype for name, value in weights_of(sharded.output_dir).items()}
    assert dtypes == {name: value.dtype for name, value in weights_of(one.output_dir).items()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def expect_same_losses(recipe: Recipe, expected: Recipe) -> None:
    """Compare the losses of training and of one evaluation."""
    for name in ("loss", "eval_loss"):
        losses = losses_of(expected.output_dir, name)
        assert losses_of(recipe.output_dir, name) == pytest.approx(losses, rel=LOSS_TWO_WAYS)
    assert len(losses) == 1


def assert_same_model(run_dir: Path, expected_dir: Path) -> None:
    """Compare weights up to the effect of rounding on AdamW's steps."""
    weights = weights_of(run_dir)
    # A step of AdamW is at most 1e-3 for any gradient; a gradient of pure rounding changes it by 1e-2 of a step.
    for name, value in weights_of(expected_dir).items():
        torch.testing.assert_close(weights[name], value, **TWO_WAYS, msg=name)
