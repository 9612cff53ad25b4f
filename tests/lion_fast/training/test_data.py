"""Training data of a recipe: files, shards and scenes, augmentation and tags, and unusable records."""

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from lion_fast.data import DataError, JsonlDataset, TrainingData
from lion_fast.data.order import Key
from lion_fast.io.boxes import format_box
from lion_fast.training import RecipeError, train
from lion_fast.training.data import SceneSamples, TaskSamples, hold_to, open_evaluation_data, open_training_data
from tests.lion_fast.tiny import scene_processor
from tests.lion_fast.training.runs import Files, MakeRecipe


def test_random_numbers_of_a_sample_depend_on_seed_and_position() -> None:
    class Draws(Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"drawn": (random.random(), torch.rand(1).item())}

    def drawn(position: int, index: int = 0, seed: int = 0) -> Any:
        return TrainingData({"a": Draws()}, seed)[Key(position, "a", 0, index)]["drawn"]

    assert drawn(3) == drawn(3)
    assert len({drawn(3), drawn(4), drawn(3, seed=1)}) == 3


def test_training_data_combines_files_shards_and_scenes_with_augmentation_and_tags(
    make_recipe: MakeRecipe, files: Files, tagger_dir: Path, tmp_path: Path
) -> None:
    untagged = tmp_path / "untagged.jsonl"
    lines = [json.loads(line) for line in files.jsonl.read_text().splitlines()[:40]]
    untagged.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "tags"}) + "\n" for line in lines))
    recipe = make_recipe(
        2,
        f"data.train.region_level=['{untagged}', '{files.shards}', 'scenes:1:9']",
        f"data.evaluate.region_level=['{untagged}']",
        f"data.image_root={files.jsonl.parent}",
        f"data.tagger={tagger_dir}",
        "data.augmentation={flip: 1.0, crop: 0.0}",
    )
    samples = open_training_data(recipe.data, 0)["region_level"]
    plain = open_evaluation_data(recipe.data)["region_level"]
    shards = JsonlDataset(files.jsonl, task="region_level")
    assert len(samples) == len(plain) + len(shards) + 9
    flipped = 0
    for index in range(len(plain)):
        sample, before = samples[index], plain[index]
        assert sample["tags"] == before["tags"] == ["red", "blue"]
        assert sample["place"] == before["place"]
        for box in sample["boxes"]:
            assert format_box(box) in sample["question"] + sample["answer"]
        if sample["boxes"] != before["boxes"]:
            flipped += 1
            assert [1 - x for x in sample["boxes"][0][::2]] == pytest.approx(before["boxes"][0][2::-2])
            assert sample["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() == before["image"].tobytes()
    assert flipped > 0
    assert "byte" in samples[len(plain)]["place"]
    assert samples[len(plain)]["tags"] not in (None, ["red", "blue"]), "a record's own tags are kept"
    assert samples[len(samples) - 1]["place"] == "scenes:1:9:8"
    order = samples.epoch_order(0, 0)
    assert sorted(order) == list(range(len(samples)))
    assert not np.array_equal(order, samples.epoch_order(0, 1))
    known = open_training_data(make_recipe(2, *files.overrides()).data, 0)["region_level"]
    assert known.lengths is not None
    assert samples.lengths is None
    with pytest.raises(RecipeError, match=r"expected samples of image_level, got 'region_level' as sample 0 of a"):
        TaskSamples("image_level", {"a": SceneSamples("region_level", 0, 1)})[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_lines_and_images_stop_a_run_or_are_skipped_and_counted(
    make_recipe: MakeRecipe, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """Missing and truncated images, boxes out of range and reversed, no answer, an unknown task, invalid JSON."""
    good = [json.loads(line) for line in files.jsonl.read_text().splitlines() if '"region_level"' in line][:4]
    cut = tmp_path / "cut.png"
    cut.write_bytes((files.jsonl.parent / good[0]["image"]).read_bytes()[:200])
    bad = [{"boxes": [[0.1, 0.1, 1.2, 0.5]]}, {"boxes": [[0.5, 0.1, 0.2, 0.5]]}, {"answer": " "}, {"task": "both"}]
    images = [{"image": "missing.png"}, {"image": str(cut)}]
    lines = [json.dumps(good[0] | change) for change in ({}, *bad, *images)]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join([*lines, "{", *map(json.dumps, good[1:])]) + "\n")
    root = files.jsonl.parent
    settings = (f"data.train.region_level=['{file}']", f"data.image_root={root}", f"data.workers={workers}")
    with pytest.raises(DataError, match=rf"^{file}:2: boxes\[0\]: expected shares of width and height"):
        train(make_recipe(2, *settings))
    train(make_recipe(2, *settings, "data.skip_bad=true"))
    assert "data.train: skipped 5 invalid lines and 2 samples with an unreadable image" in capsys.readouterr().out
    file.write_text(lines[5] + "\n")
    with pytest.raises(DataError) as caught:
        train(make_recipe(2, *settings, name="strict"))
    assert str(caught.value).startswith(f"{file}:1: image")
    assert len(str(caught.value).splitlines()) == 1
    assert not multiprocessing.active_children(), "workers end with the run, not seconds after it"


def test_records_that_the_model_does_not_take_are_unusable(files: Files, tmp_path: Path) -> None:
    """`data check` knows the soft prompt's usual token; that of a model is known when training starts."""
    lines = [json.loads(line) for line in files.jsonl.read_text().splitlines() if '"image_level"' in line][:3]
    lines[1]["question"] = "Is this <soft>?"
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    processor = scene_processor(20)
    processor.soft_prompt_token = "<soft>"
    for strict in (True, False):
        source = JsonlDataset(file, files.jsonl.parent, strict=strict)
        samples = TaskSamples("image_level", {"a": source, "b": SceneSamples("image_level", 0, 1)})
        hold_to(processor, {"image_level": samples})
        assert samples[0]["place"] == f"{file}:1"
        if strict:
            with pytest.raises(DataError, match=r"^.*train.jsonl:2: text\[0\]: expected text without '<soft>'"):
                samples[1]
        else:
            assert samples[1]["place"] == f"{file}:3"
            assert source.num_bad_images == 1
