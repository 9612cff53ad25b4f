"""The directory of a run: its owner, its permissions, other people's files, damage, and data that have changed."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from lion_fast.io.checkpoints import CheckpointError
from lion_fast.io.owning import OutputInUseError
from lion_fast.training import RecipeError, saving, train
from lion_fast.training.fingerprints import RECORD, expect_same_files, fingerprints_of, write_fingerprints
from lion_fast.training.recipe import Recipe, dump_recipe
from lion_fast.training.run_folder import begin_run, owned_run
from tests.lion_fast.training.runs import Files, MakeRecipe, recipe_maker, wait_for, weights_of


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def resume(recipe: Recipe, **options: Any) -> Path | None:
    """Resume a run up to its first step, and return the checkpoint that it resumes from."""
    with owned_run(recipe, resume=True, **options) as start:
        begin_run(recipe, start)
    return start.checkpoint


@pytest.fixture(scope="module")
def trained(
    files: Files, tagger_dir: Path, tiny_lion: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path, Path]:
    """Train a run of two steps on copies of all files; return its recipe, its directory and a copy of that."""
    directory, kept = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("kept") / "stopped"
    for source in (files.jsonl.parent, files.shards, tagger_dir, tiny_lion):
        shutil.copytree(source, directory / source.name)
    recipe = recipe_maker(directory, directory / tiny_lion.name)(
        3,
        f"data.train.image_level=['{directory / files.jsonl.parent.name / files.jsonl.name}']",
        f"data.train.region_level=['{directory / files.shards.name}']",
        f"data.tagger={directory / tagger_dir.name}",
        "checkpoints.every=1",
        "steps=2",
    )
    train(recipe)
    saving.remove(Path(recipe.output_dir) / "checkpoint-2")
    shutil.copytree(directory, kept)
    return recipe, directory, kept


@pytest.fixture
def stopped(trained: tuple[Recipe, Path, Path]) -> Recipe:
    """Return the recipe of a run that was stopped at step 1 of 2, with all its files as they were then."""
    recipe, directory, kept = trained
    shutil.rmtree(directory)
    shutil.copytree(kept, directory)
    return recipe


def test_one_run_owns_a_directory(make_recipe: MakeRecipe, start: Callable[..., Any], tmp_path: Path) -> None:
    """A second run stops before it reads or removes anything; the kernel releases the lock of a killed run."""
    recipe, said = make_recipe(3, "steps=3", "checkpoints.every=1"), tmp_path / "said"
    run_dir = Path(recipe.output_dir)
    process = start(recipe, said_at=(60, str(said)), hold_at=61)
    wait_for(said, process)
    before = content(run_dir)
    (tmp_path / "link").symlink_to(run_dir)
    for name, resumes in (("run", False), ("run", True), ("link", True)):
        second = make_recipe(3, "model.carry_over=[absent]", name=name)
        with pytest.raises(OutputInUseError, match=rf"output_dir: expected a directory that no other run is.*{name}$"):
            train(second, resume=resumes)
    assert content(run_dir) == before
    process.kill()
    process.join()
    train(recipe, resume=True)
    assert (run_dir / "model").is_dir()
    assert not (run_dir / ".run.lock").exists()


def test_files_have_the_permissions_of_the_umask(make_recipe: MakeRecipe) -> None:
    before = os.umask(0o027)
    try:
        train(recipe := make_recipe(3, "steps=2", "data.evaluate.image_level=['scenes:1:2']", "evaluation.every=2"))
    finally:
        os.umask(before)
    paths = [Path(recipe.output_dir), *Path(recipe.output_dir).rglob("*")]
    assert any(path.name == "step-2.png" for path in paths)
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_a_run_resumes_on_the_data_of_its_start(stopped: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    run_dir, data = Path(stopped.output_dir), stopped.data
    (jsonl,), (shards,), (model,) = data.train.image_level, data.train.region_level, stopped.model.carry_over
    checkpoint = run_dir / "checkpoint-1"
    assert resume(stopped) == checkpoint
    shard = next(Path(shards).glob("*.tar"))
    for key, file in (
        ("data.train.image_level", Path(jsonl)),
        ("data.train.region_level", Path(shards, "index.npz")),
        ("data.train.region_level", shard),
        ("model.carry_over", Path(model, "model.safetensors")),
        ("data.tagger", Path(data.tagger or "", "config.json")),
    ):
        original = file.read_bytes()
        # The same size and the same time, as after `rsync` or a restored backup
        times = file.stat()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        before = content(run_dir)
        with pytest.raises(
            RecipeError, match=rf"^{key}: expected {file} as at the start of the run, got a changed one"
        ):
            resume(stopped)
        assert content(run_dir) == before
        file.unlink()
        with pytest.raises(RecipeError, match=rf"^{key}: expected {file} as at the start of the run, got none"):
            resume(stopped)
        file.write_bytes(original)
    Path(model, "more.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"expected .*more.safetensors as .*, got a new one; to resume nevertheless"):
        resume(stopped)
    assert resume(stopped, allow_changed_data=True) == checkpoint
    assert "resuming with other data: model.carry_over: expected" in caplog.text
    assert resume(stopped) == checkpoint, "the change is recorded"


def test_the_record_of_data_may_be_missing_but_not_damaged(stopped: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    record = Path(stopped.output_dir) / RECORD
    for damaged in ("", "[]", '{"version": 1, "files": [1]}', "[" * 100_000, '{"version": 2, "files": {}}', "\udcff"):
        record.write_text(damaged, errors="surrogateescape")
        with pytest.raises(RecipeError, match=rf"^{record}: .*--allow-changed-data"):
            resume(stopped)
    record.unlink()  # a run of an earlier version
    resume(stopped)
    assert "nothing shows whether the data are those of the start" in caplog.text
    assert record.is_file()


def test_a_run_may_move(stopped: Recipe) -> None:
    """Its directory has another name then, or the same one written in another way."""
    moved = Path(stopped.output_dir).with_name("moved")
    same = os.path.relpath(stopped.output_dir)
    assert resume(replace(stopped, output_dir=same)) == Path(same) / "checkpoint-1"
    os.rename(stopped.output_dir, moved)
    assert resume(replace(stopped, output_dir=str(moved))) == moved / "checkpoint-1"


def test_a_run_resumes_on_its_evaluation_data(make_recipe: MakeRecipe, files: Files, tmp_path: Path) -> None:
    """Otherwise its curve would join two measures."""
    shutil.copy(files.jsonl, evaluation := tmp_path / "evaluation.jsonl")
    recipe = make_recipe(3, f"data.evaluate.image_level=['{evaluation}']")
    found = fingerprints_of(recipe)
    write_fingerprints(tmp_path, found)
    expect_same_files(tmp_path, found)
    evaluation.write_text(evaluation.read_text() + "\n")
    with pytest.raises(RecipeError, match=r"^data.evaluate.image_level: expected .*evaluation.jsonl .*got a changed"):
        expect_same_files(tmp_path, fingerprints_of(recipe))
    # The record of an earlier version does not have them.
    write_fingerprints(tmp_path, {key: files for key, files in found.items() if "evaluate" not in key})
    expect_same_files(tmp_path, found)


def test_changed_data_need_not_stop_a_run_that_starts_anew(stopped: Recipe) -> None:
    shutil.rmtree(Path(stopped.output_dir) / "checkpoint-1")
    Path(stopped.data.train.image_level[0]).write_text("{}")
    assert resume(stopped) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("recipe.yaml", "expected the directory of a run, or one without recipe.yaml"),
        ("model/model.safetensors", "expected the directory of a run, or one without model"),
        ("pictures/me.png", "expected the directory of a run, or one without pictures"),
        ("checkpoint-7/mine.txt", "expected a directory without checkpoints"),
        ("checkpoint-7", "expected a directory without checkpoints"),
        ("model", "expected a directory at .*model, or nothing"),
        ("nonfinite", "expected a directory at .*nonfinite, or nothing"),
    ],
)
def test_files_that_no_run_wrote_are_left_alone(make_recipe: MakeRecipe, name: str, message: str) -> None:
    recipe = make_recipe(3)
    mine = Path(recipe.output_dir) / name
    mine.parent.mkdir(parents=True)
    mine.write_text("# mine\nstage: 3\n")
    for resumes in (False, True):
        with pytest.raises(RecipeError, match="output_dir: " + ("" if resumes else message)):
            train(recipe, resume=resumes)
    assert content(Path(recipe.output_dir)) == {name: b"# mine\nstage: 3\n"}


def test_a_directory_is_not_taken_over_by_another_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(3)
    run_dir = Path(recipe.output_dir)
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")  # not a name that a run writes
    (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    (run_dir / "model").mkdir()
    with pytest.raises(RecipeError, match="output_dir: expected a directory without model, the result of a run"):
        train(recipe)
    (run_dir / "model").rmdir()
    with owned_run(recipe, resume=False):
        pass
    (run_dir / "recipe.yaml").write_text("# mine\n" + dump_recipe(recipe))
    with pytest.raises(RecipeError, match=r"has no recipe.yaml that a run wrote"):
        train(recipe)
    (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    os.mkfifo(run_dir / RECORD)
    with pytest.raises(RecipeError, match=rf"output_dir: expected a file at .*{RECORD}, or nothing, got a directory"):
        train(recipe)
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("absent/absent")
    for name in ("file", "nowhere"):
        with pytest.raises(FileExistsError, match=f"output_dir: expected a directory, got a file.*{name}"):
            train(make_recipe(3, name=name))
    with pytest.raises(OSError, match="file/run"):
        train(make_recipe(3, name="file/run"))
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        train(make_recipe(3, "model.carry_over=[absent]", name="unused"))


@pytest.mark.parametrize("seal", ["", "{}", "[]", "null", '{"a": 1}', '{"a": {"size": 1}}', "[" * 100_000, "\udcff"])
def test_damaged_checkpoints_are_put_aside(make_recipe: MakeRecipe, seal: str) -> None:
    """Whatever is named as a checkpoint and is none is skipped, and nothing of it is lost."""
    recipe = make_recipe(3)
    run_dir = Path(recipe.output_dir)
    with owned_run(recipe, resume=False) as begun:
        begin_run(recipe, begun)
    for number in (1, 2, 4, 5, 6, 7):
        (run_dir / f"checkpoint-{number}").mkdir()
        (run_dir / f"checkpoint-{number}" / "weights").write_text(str(number))
        saving.seal(run_dir / f"checkpoint-{number}")
    (run_dir / "checkpoint-4" / saving.SEAL).write_text(seal, errors="surrogateescape")
    outside = {"../checkpoint-1/weights": {"size": 1, "sha256": "?"}}
    (run_dir / "checkpoint-5" / saving.SEAL).write_text(json.dumps(outside))
    (run_dir / "checkpoint-6" / saving.SEAL).unlink()
    os.mkfifo(run_dir / "checkpoint-6" / saving.SEAL)
    (run_dir / "checkpoint-7" / "weights").write_text("?")
    (run_dir / "checkpoint-3").write_text("a file")
    (run_dir / "checkpoint-8").write_text("a file")
    (run_dir / "checkpoint-9").symlink_to("checkpoint-1")
    (run_dir / "checkpoint-10").symlink_to("absent")
    (run_dir / "damaged-checkpoint-7").mkdir()
    assert resume(recipe) == run_dir / "checkpoint-9"
    assert (run_dir / "damaged-checkpoint-10").is_symlink()
    (run_dir / "checkpoint-9").unlink()
    assert resume(recipe) == run_dir / "checkpoint-2"
    left = sorted(path.name for path in run_dir.glob("*checkpoint-*"))
    aside = [f"damaged-checkpoint-{name}" for name in ("10", "3", "4", "5", "6", "7", "7-2", "8")]
    assert left == ["checkpoint-1", "checkpoint-2", *aside]
    assert (run_dir / "damaged-checkpoint-7-2" / "weights").read_text() == "?"
    (run_dir / "checkpoint-0").write_text("a file")
    saving.keep_newest(run_dir, 1)
    assert [path.name for path in saving.entries(run_dir)] == ["checkpoint-2", "checkpoint-0"]


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_checkpoint_that_was_sealed_again_is_an_error(stopped: Recipe, file: str) -> None:
    run_dir = Path(stopped.output_dir)
    checkpoint = run_dir / "checkpoint-1"
    (checkpoint / file).write_bytes(b"[]")
    saving.seal(checkpoint)
    with pytest.raises((CheckpointError, OSError), match=rf"{checkpoint}.*: not ") as caught:
        train(stopped, resume=True)
    assert len(str(caught.value).splitlines()) == 1
    assert checkpoint.is_dir()


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # tokenizers
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # torch.save
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_errors_of_a_full_disk_name_the_checkpoint(tmp_path: Path, error: Exception) -> None:
    def write(raised: Exception) -> None:
        with saving.written_aside(tmp_path / "checkpoint-2") as aside:
            (aside / "weights").touch()
            raise raised

    with pytest.raises(OSError, match="checkpoint-2") as caught:
        write(error)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == [saving.ASIDE]
    with pytest.raises(RuntimeError, match="mine"):
        write(RuntimeError("mine"))


def test_a_resumed_run_needs_its_recipe(stopped: Recipe) -> None:
    recorded = Path(stopped.output_dir) / "recipe.yaml"
    text = recorded.read_text()
    for damaged, message in (
        (None, "expected the directory of a run, or one without checkpoint-1"),
        ("[", "recipe.yaml: not readable as YAML"),
        (text + "steps: 3\n", "recipe.yaml: not readable as YAML .*key 'steps' is given twice"),
        (text.replace("steps: 2", "steps: 3"), "steps: expected 3, as at the start of the run, got 2"),
    ):
        recorded.unlink()
        if damaged is not None:
            recorded.write_text(damaged)
        with pytest.raises(RecipeError, match=message):
            resume(stopped)
        recorded.write_text(text)
    weights = weights_of(stopped.output_dir)
    train(stopped, resume=True)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(stopped.output_dir).items())
