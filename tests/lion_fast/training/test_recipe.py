"""Recipes: their content, their errors, and their schedule."""

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        ("steps=" + "9" * 50, "steps: expected less than or equal to 2147483647, got an integer of 167 bits"),
        ("steps=0x" + "f" * 5000, "steps: expected less than or equal to 2147483647, got an integer of 20000 bits"),
        ("steps=" + "9" * 5000, "steps: not readable as YAML (Exceeds the limit"),
        ("optimizer.weight_decay=" + "9" * 400, "optimizer.weight_decay: expected a finite number, got an integer"),
        ("optimizer.clip=.inf", "optimizer.clip: expected a finite number, got inf"),
        ("optimizer.betas=[0.9, .nan]", "optimizer.betas.1: expected greater than or equal to 0, got nan"),
        ("optimizer.lr=1e-320", "lr: expected a rate that min_lr 1e-05 can be divided by, got 1e-320"),
        ("data={mix: step, mix: sample}", "data: not readable as YAML (key 'mix' is given twice, in lines 1 and 1)"),
        ("data=&a {train: *a}", "data: not readable as YAML (a refers to itself"),
        ("data=" + "[" * 5000, "data: not readable as YAML (expected at most 50 levels"),
        ("data.skip_bad=!!bool x", "data.skip_bad: not readable as YAML ('x')"),
        ("data.skip_bad=2001-02-30", "data.skip_bad: not readable as YAML (day is out of range for month)"),
        ("steps=!!python/object/apply:os.system [x]", "steps: not readable as YAML (could not determine a constructor"),
        ("a\nb=1", "'a\\nb': unknown key"),
        ("a.b.c=[" + "1, " * 1000 + "1]", "a: unknown key"),
        ("optimizer=[" + "1, " * 1000 + "1]", "optimizer: expected keys with values, got [1, 1, 1, 1, 1, 1, ...]"),
        ("output_dir=''", "output_dir: expected a path, got ''"),
        ('output_dir="a\\0b"', "output_dir: expected a path, got 'a\\x00b'"),
        ('output_dir="\\udcff"', "output_dir: expected a path in UTF-8, got '\\udcff'"),
        ("output_dir=" + "a" * 300, "output_dir: expected a path of at most 4000 characters and names of at most 255"),
        ("output_dir=$LION_UNSET/a", "output_dir: expected environment variables that are set ($LION_UNSET is not)"),
        ("data.tagger=~no-such-user/a", "data.tagger: expected the name of a user after ~, got '~no-such-user/a'"),
        (
            "data.train.image_level=[a.jsonl, ./a.jsonl]",
            "image_level: expected each source once, got 'a.jsonl' and",
        ),
        ("data.train.image_level=['scenes:0:1', 'scenes:0:1']", "image_level: expected each source once"),
        ("stage=2", "stage: expected 1 (the requested stage), got 2"),
        ("steps", "override: expected section.key=value, got 'steps'"),
        ("a." * 5000 + "b=1", "override: expected section.key=value, got 'a.a."),
    ],
)
def test_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(1, overrides=[override])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


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


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: 3\nseed: \xff\n", "expected text in UTF-8, got other bytes in line 2"),
        (b"steps: 3\x00\n", "not readable as YAML"),
        ("steps: 3\n".encode("utf-16"), "expected text in UTF-8, got other bytes in line 1"),
        (b"steps: 3\nseed: 1\nsteps: 4\n", r"key 'steps' is given twice, in lines 1 and 3"),
        (b"data: " + b"[" * 10**5, "expected at most 50 levels"),
        (BOMB.encode(), "expected at most 50000 values"),
        (b"- 1\n", "expected keys with values, got list"),
        (b"#" * (1 << 20) + b"\n", "expected at most 1048576 bytes, got more"),
        (b"".join(b"key%d: 1\n" % i for i in range(10**4)), "unknown key; .*; and [0-9]+ more$"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(1, file)
    assert "mine.yaml" in str(caught.value) or "unknown key" in message
    assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(RecipeError, match=r"expected a YAML file, got (a directory|no regular file)"):
            load_recipe(1, tmp_path / name)
    for name in ("absent.yaml", "a" * 5000):
        with pytest.raises(OSError, match=name[:50]) as caught:
            load_recipe(1, tmp_path / name)
        assert len(str(caught.value)) < 1000
    with pytest.raises(RecipeError, match="/dev/zero: expected at most"):
        load_recipe(1, "/dev/zero")
    for stage in (0, 5, "1", None, 10**5000):
        with pytest.raises(ValueError, match="stage: expected one of 1, 2, 3, 4, got"):
            load_recipe(stage)  # type: ignore[arg-type]


def test_aliases_and_merged_keys_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  train: &s {image_level: [a.jsonl]}\n  evaluate: {<<: *s, region_level: [b.jsonl]}\n")
    data = load_recipe(1, file).data
    assert (data.evaluate.image_level, data.evaluate.region_level) == (["a.jsonl"], ["b.jsonl"])


def test_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Any]) -> None:
    """`~` and variables, in files, overrides and recipes made in Python; a name that is no path stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text("model: {frozen_from: ~/a, qformer_from: $DATA/q.pth, carry_over: ['${DATA}/b', ~/c]}\n")
    sources = "data.train={image_level: [~/d.jsonl, 'scenes:$DATA:1'], region_level: [$DATA/shards]}"
    recipe = load_recipe(3, file, ["output_dir=~/runs/a", sources, "data.tagger=~", "data.image_root=~/images"])
    home = str(tmp_path)
    assert recipe.output_dir == f"{home}/runs/a"
    model = recipe.model
    assert (model.frozen_from, model.qformer_from) == (f"{home}/a", "/data/q.pth")
    assert model.carry_over == ["/data/b", f"{home}/c"]
    assert recipe.data.train.image_level == [f"{home}/d.jsonl", "scenes:$DATA:1"]
    assert recipe.data.train.region_level == ["/data/shards"]
    assert (recipe.data.tagger, recipe.data.image_root) == (None, f"{home}/images")
    assert replace(recipe, output_dir="~/b").output_dir == f"{home}/b"
    assert Recipe.read(recipe.plain()) == recipe
    (tmp_path / "$UNSET_AND_THERE").mkdir()
    assert load_recipe(3, None, ["output_dir=$UNSET_AND_THERE"]).output_dir == "$UNSET_AND_THERE"
    file.write_text("steps: 0\n")
    status, _, err = run_cli("train", "--stage", 3, "--config=~/mine.yaml")
    assert (status, err) == (2, "lion-fast train: steps: expected greater than or equal to 1, got 0\n")


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
