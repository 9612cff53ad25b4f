"""Recipes: their content, their errors, and their schedule."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from lion_fast.training import RecipeError, load_recipe, shipped_recipe
from lion_fast.training.building import build_model
from lion_fast.training.data import open_training_data, training_order
from lion_fast.training.recipe import Recipe, check_resumable
from lion_fast.training.run import SCHEDULE, schedule_rates
from lion_fast.training.stages import parameter_groups
from tests.lion_fast.training.runs import MakeRecipe


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_shipped_recipes_are_complete(stage: int) -> None:
    recipe = load_recipe(stage)
    assert recipe.stage == stage
    assert recipe.optimizer.lr == (1e-5 if stage == 4 else 1e-4)
    settings, below = shipped_recipe(stage).split("log_every: 50             # [ours], like everything below\n")
    numbers = [line for line in settings.splitlines() if re.match(r" *\w+: +\[?[0-9]", line)]
    assert len(numbers) > 15
    assert all("# [" in line for line in numbers if not line.startswith("stage:")), "every number names its source"
    assert "evaluation:" in below


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key; expected one of lr, min_lr, warmup_lr"),
        ("stepz=1", "stepz: unknown key; expected one of stage, output_dir"),
        ("steps=many", "steps: expected a valid integer, got 'many'"),
        ("steps=true", "steps: expected a valid integer, got True"),
        ("optimizer.lr='1e-4'", "optimizer.lr: expected a valid number, got '1e-4'"),
        ("optimizer.lr=-1", "optimizer.lr: expected greater than 0, got -1"),
        ("precision=fp16", "precision: expected 'bf16' or 'fp32', got 'fp16'"),
        ("optimizer=3", "optimizer: expected keys with values, got 3"),
        ("data.shares.image_level=0", "data.shares.image_level: expected greater than or equal to 1, got 0"),
        ("data.shares={region: 2}", "data.shares.region: unknown key; expected one of image_level, region_level"),
        ("data.image_to_region=3", "data.image_to_region: expected a list of 2, got 3"),
        ("data.augmentation.flip=2", "data.augmentation.flip: expected less than or equal to 1, got 2"),
        ("data.augmentation.turn=1", "data.augmentation.turn: unknown key; expected one of flip, crop, crop_min_scale"),
        ("data.prefetch=0", "data.prefetch: expected greater than or equal to 1, got 0"),
        ("data={group_by_length: true, shuffle: false}", "group_by_length: expected false with shuffle false"),
        ("data.train.image_level=x", "data.train.image_level: expected a valid list, got 'x'"),
        ("stage=2", "stage: expected 1 (the requested stage), got 2"),
        ("steps", "override: expected section.key=value, got 'steps'"),
    ],
)
def test_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(1, overrides=[override])
    assert message in str(caught.value)


def test_a_recipe_is_checked_on_creation(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    assert Recipe.read(recipe.plain()) == recipe
    assert type(make_recipe(3, "optimizer.clip=1").optimizer.clip) is float
    for section, changed, message in (
        (recipe.optimizer, {"lr": -1.0}, "lr: expected greater than 0, got -1.0"),
        (recipe.optimizer, {"lr": float("nan")}, "lr: expected greater than 0, got nan"),
        (recipe.optimizer, {"betas": (0.9,)}, "betas: expected a list of 2, got (0.9,)"),
        (recipe.optimizer, {"betas": (0.9, "x")}, "betas.1: expected a valid number, got 'x'"),
        (recipe.model, {"dropout": True}, "dropout: expected a valid number or null, got True"),
        (recipe.data, {"shuffle": False, "group_by_length": True}, "group_by_length: expected false with shuffle"),
        (
            recipe,
            {"data": None, "seed": -1},
            "data: expected Data, got None; seed: expected greater than",
        ),
    ):
        with pytest.raises(RecipeError) as caught:
            replace(section, **changed)
        assert str(caught.value).startswith(message)
    settings = recipe.plain()
    del settings["batch"]["size"], settings["seed"]
    with pytest.raises(RecipeError, match=r"^batch.size: missing; seed: missing$"):
        Recipe.read(settings)


def test_a_file_overrides_the_recipe_of_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer:\n  lr: 3e-5\nsteps: 7\n")
    recipe = load_recipe(1, file, ["steps=8"])
    assert (recipe.optimizer.lr, recipe.optimizer.min_lr, recipe.steps) == (3e-5, 1e-5, 8)
    file.write_text("steps: [\n")
    with pytest.raises(RecipeError, match=r"mine.yaml: not readable as YAML"):
        load_recipe(1, file)


def test_the_deprecated_key_of_shares_still_loads(tmp_path: Path) -> None:
    """`data.image_to_region: [a, b]` means `data.shares` in files, in overrides and in the recipe of a resumed run."""
    file = tmp_path / "mine.yaml"
    file.write_text("data: {image_to_region: [2, 1], mix: sample}\n")
    with pytest.warns(FutureWarning, match="data.image_to_region is now data.shares"):
        from_file = load_recipe(3, file)
    with pytest.warns(FutureWarning, match="data.image_to_region is now data.shares"):
        from_override = load_recipe(3, overrides=["data.image_to_region=[2,1]", "data.mix=sample"])
    recipe = load_recipe(3, overrides=["data.shares.image_level=2", "data.mix=sample"])
    assert from_file == from_override == recipe
    began = recipe.plain()
    del began["data"]["shares"]
    check_resumable({**began, "data": {**began["data"], "image_to_region": [2, 1]}}, recipe.plain())
    with pytest.raises(RecipeError, match=r"data.shares.image_level: expected 1, as at the start of the run, got 2"):
        check_resumable({**began, "data": {**began["data"], "image_to_region": [1, 1]}}, recipe.plain())
    with pytest.raises(RecipeError, match=r"data.image_to_region: expected data.shares alone, got both"):
        load_recipe(3, overrides=["data={image_to_region: [1, 1], shares: {image_level: 2}}"])


def test_the_sample_order_of_a_recipe_is_stable(make_recipe: MakeRecipe) -> None:
    """Keys equal those of the first release, image level first, so that a resumed run reads the same samples."""
    recipe = make_recipe(3, "data.shares.image_level=2")
    keys = list(training_order(recipe, open_training_data(recipe.data, 0)))
    image_level, region_level = (
        [key.index for key in keys if key.name == f"{level}_level"] for level in ("image", "region")
    )
    assert [key.name for key in keys[:3]] == ["image_level", "region_level", "image_level"]
    assert image_level[:7] == [5, 3, 1, 4, 2, 6, 0]
    assert region_level[:3] == [2, 5, 3]


def test_data_and_model_are_checked_before_a_run(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"data.train.region_level: expected one file or more, got \[\]"):
        make_recipe(3, "data.train.region_level=[]").check_sources()
    with pytest.raises(RecipeError, match=r"data.train.region_level: expected none in stage 1, got \['x.jsonl'\]"):
        make_recipe(1, "data.train.region_level=['x.jsonl']").check_sources()
    with pytest.raises(RecipeError, match=r"model: expected a directory in model.frozen_from or model.carry_over"):
        make_recipe(1, "model.carry_over=[]").check_sources()
    with pytest.raises(RecipeError, match=r"batch.size: expected a multiple of 6 .* got 4"):
        make_recipe(1, "batch.per_process=3").batch.accumulation(2)
    for source, message in {
        "scenes:x": r"data.train.image_level: expected scenes:SEED:COUNT with whole numbers, got 'scenes:x'",
        "x.txt": r"data.train.image_level: expected a .jsonl file, a directory of .* got 'x.txt'",
        "absent.jsonl": r"data.train.image_level: path: expected a file of JSON lines.*absent.jsonl",
        ".": r"data.train.image_level: directory: expected shards and their index",
    }.items():
        with pytest.raises(RecipeError, match=message):
            open_training_data(make_recipe(1, f"data.train.image_level=['{source}']").data, 0)
    with pytest.raises(RecipeError, match=r"data.tagger: expected a directory of .* got 'absent'"):
        open_training_data(make_recipe(1, "data.tagger=absent").data, 0)
    recipe = make_recipe(1, "data.group_by_length=true")
    with pytest.raises(RecipeError, match=r"data.group_by_length: expected datasets with known .* got .*scenes:0:7"):
        training_order(recipe, open_training_data(recipe.data, 0))


def test_a_run_resumes_only_with_the_same_settings(make_recipe: MakeRecipe) -> None:
    began = make_recipe().plain()
    check_resumable(began, make_recipe(3, "batch.per_process=4", "checkpoints.keep=1").plain())
    with pytest.raises(RecipeError, match=r"optimizer.lr: expected 0.001, as at the start of the run, got 0.002"):
        check_resumable(began, make_recipe(3, "optimizer.lr=2e-3").plain())


def test_the_schedule_warms_up_and_ends_at_the_minimum(make_recipe: MakeRecipe) -> None:
    """Stage 3: 1e-6 -> 1e-4 in 2000 steps, 1e-5 at the end; the aggregator's rate is scaled in every step."""
    recipe = make_recipe(3, "optimizer.lr=1e-4", "optimizer.warmup_steps=2000", "optimizer.boost_lr_scale=0.2")
    model, _ = build_model(recipe)
    settings = recipe.optimizer
    groups = parameter_groups(model, lr=settings.lr, boost_lr_scale=settings.boost_lr_scale)
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler(SCHEDULE, optimizer, 2000, 10_000, scheduler_specific_kwargs=schedule_rates(recipe))
    rates = []
    for _ in range(10_000):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    base, aggregator = [step[0] for step in rates], [step[-1] for step in rates]
    assert [base[0], base[1999], base[-1]] == pytest.approx([1e-6, 1e-4, 1e-5])
    assert base[1000] == pytest.approx(1e-6 + (1e-4 - 1e-6) * 1000 / 1999)
    assert all(later > earlier for earlier, later in itertools.pairwise(base[:2000]))
    assert all(later <= earlier for earlier, later in itertools.pairwise(base[1999:]))
    assert aggregator == pytest.approx([0.2 * rate for rate in base])
