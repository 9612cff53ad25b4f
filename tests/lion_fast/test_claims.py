"""The experiment on the paper's claims: arms differ in what they say they do, and the command goes on when stopped."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.claims.__main__ import main
from benchmarks.claims.arms import ARMS, JOINT, REGION, STAGED, replace_tags
from benchmarks.claims.experiment import SMOKE, Experiment, run
from benchmarks.claims.report import difference
from lion_fast.quickstart import evaluation
from lion_fast.scenes import TAGS

SEEDS = [3, 4]
ARM = {arm.name: arm for arm in ARMS}


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    """Generate four tokens: models that were trained for a few steps rarely end an answer by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluation._GREEDY, "max_new_tokens", 4)
        yield


@pytest.fixture(scope="module")
def output_dir(_short_answers: None, quickstart_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("claims")
    run(path, quickstart_dir / "checkpoint", seeds=SEEDS, settings=SMOKE)
    return path


def test_everything_that_was_promised_is_written(output_dir: Path) -> None:
    report = json.loads((output_dir / "claims.json").read_text())
    assert [(each["arm"], each["seed"]) for each in report["results"]] == [(a.name, s) for s in SEEDS for a in ARMS]
    assert all(0 <= share <= 1 for each in report["results"] for share in each["accuracy"].values())
    page = (output_dir / "claims.md").read_text()
    assert all(arm.label in page for arm in ARMS if arm.name != "stage1")
    assert "--seeds 3 4" in page
    with Image.open(output_dir / "images" / "claims.png") as picture:
        assert min(picture.size) > 600


def test_what_is_done_is_not_done_again(
    output_dir: Path, quickstart_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (output_dir / "claims.json").read_text()
    lost = output_dir / "arms" / "shared-seed4.json"
    lost.unlink()
    trained = []
    original = Experiment._train_and_measure

    def remember(self: Experiment, arm, seed):
        trained.append((arm.name, seed))
        return original(self, arm, seed)

    monkeypatch.setattr(Experiment, "_train_and_measure", remember)
    run(output_dir, quickstart_dir / "checkpoint", seeds=SEEDS, settings=SMOKE)
    assert trained == [("shared", 4)]
    without_seconds = [
        [{k: v for k, v in each.items() if k != "cpu_seconds"} for each in json.loads(text)["results"]]
        for text in (before, (output_dir / "claims.json").read_text())
    ]
    assert without_seconds[0] == without_seconds[1]


def test_results_of_other_settings_are_refused(
    output_dir: Path, quickstart_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(quickstart_dir / "checkpoint")
    assert main(["--output", str(output_dir), "--from", checkpoint]) == 2
    assert "output_dir: expected" in capsys.readouterr().err
    assert main(["--output", str(tmp_path), "--from", checkpoint, "--seeds", "0"]) == 2
    assert "seeds: expected 2 to 10 different ones, got [0]" in capsys.readouterr().err
    assert main(["--output", str(tmp_path), "--from", str(tmp_path)]) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_arms_train_what_they_say(output_dir: Path, quickstart_dir: Path) -> None:
    experiment = Experiment(output_dir, quickstart_dir / "checkpoint", SMOKE)
    models = {name: experiment.build(ARM[name], 3) for name in ("routers", "no-routers", "shared", "last-layer")}
    trained = {name: {n for n, p in model.named_parameters() if p.requires_grad} for name, model in models.items()}
    routers = {name for name in trained["routers"] if "router" in name}
    assert routers
    assert trained["routers"] - trained["no-routers"] == routers
    assert all(JOINT.trains(name) for names in trained.values() for name in names)
    weights = {name: dict(model.named_parameters()) for name, model in models.items()}
    assert all((weights["no-routers"][name] == 1).all() for name in routers)
    # Both go on from the same weights, the two stages' own.
    for name in trained["no-routers"]:
        assert torch.equal(weights["routers"][name], weights["no-routers"][name]), name
    # The shared adapter has as many weights as the two of the mixture.
    sizes = {
        name: sum(
            p.numel() for n, p in model.named_parameters() if ".adapter." in n and p.ndim == 2 and "router" not in n
        )
        for name, model in models.items()
    }
    assert sizes["shared"] == sizes["routers"] == 2 * sizes["last-layer"]
    # Without the aggregator the last layer passes through normalised, whatever the others hold.
    assert not any(name.startswith("aggregator.") for name in trained["last-layer"])
    features = torch.randn(1, 3, 26, 128)
    others = features.clone()
    others[:, 1:] = 0
    aggregator = models["last-layer"].aggregator
    torch.testing.assert_close(aggregator(features), aggregator(others))
    changed = models["routers"].aggregator
    assert not torch.equal(changed(features), changed(others))


def test_arms_see_as_many_samples(output_dir: Path) -> None:
    results = {each["arm"]: each for each in json.loads((output_dir / "claims.json").read_text())["results"]}
    for level in ("image_level_samples", "region_level_samples"):
        staged = sum(results[name][level] for name in ("stage1", "stage2", "routers"))
        assert staged == results["shared"][level] == SMOKE.batch_size * sum(SMOKE.stage_steps) // 2
    assert {arm.stage.number for arm in STAGED} == {1, 2, 3}
    assert ARM["qformer"].stage.trains("qformer.x")
    assert not REGION.trains("qformer.x")


def test_the_share_of_wrong_tags_is_the_one_asked_for() -> None:
    tags = ("blue", "circle", "plain", "red", "star")
    rng = np.random.default_rng(0)
    drawn = [replace_tags(tags, 0.25, rng) for _ in range(400)]
    assert all(len(each) == len(tags) and set(each) <= set(TAGS) and list(each) == sorted(each) for each in drawn)
    wrong = np.mean([len(set(each) - set(tags)) / len(tags) for each in drawn])
    assert wrong == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert replace_tags(tags, 0.0, rng) == tags
    assert not set(replace_tags(tags, 1.0, rng)) & set(tags)


def test_a_difference_counts_when_its_interval_leaves_out_zero() -> None:
    ours, theirs = np.array([0.70, 0.80, 0.75]), np.array([0.60, 0.72, 0.63])
    found = difference(ours, theirs)
    # By hand: differences 0.10, 0.08, 0.12; mean 0.10, deviation 0.02, t of 2 degrees 4.303.
    assert found.mean == pytest.approx(0.10)
    assert found.reach == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)
    assert (found.ahead, found.verdict) == (3, "better")
    assert difference(theirs, ours).verdict == "worse"
    assert difference(np.array([0.7, 0.9, 0.5]), theirs).verdict == "within noise"
    with pytest.raises(ValueError, match="seeds: expected 2 to 10, got 1"):
        difference(ours[:1], theirs[:1])
