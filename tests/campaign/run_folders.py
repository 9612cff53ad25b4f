"""Run folders that are damaged, or are other people's, before a run starts or resumes in them."""

import os
import random
from pathlib import Path

from lion_fast.training import saving
from lion_fast.training.fingerprints import RECORD
from lion_fast.training.recipe import load_recipe
from lion_fast.training.run_folder import RECIPE_FILE, begin_run, owned_run
from tests.campaign.running import Trial

TEXTS = (
    "",
    "{",
    "[]",
    "{}",
    "null",
    "1",
    '"a"',
    "\0",
    "[" * 10**5,
    "9" * 5000,
    "NaN",
    "a: b",
    "- a",
    "# mine\n",
    "\ufeff{}",
)
SEALS = (
    '{"a": 1}',
    '{"a": {}}',
    '{"weights": {"size": "1", "sha256": 1}}',
    '{"weights": {"size": 1e400, "sha256": null}}',
    '{"/etc/passwd": {"size": 1, "sha256": ""}}',
    '{"../checkpoint-1/weights": {"size": 1, "sha256": ""}}',
    '{"a\\u0000b": {"size": 1, "sha256": ""}}',
    '{"": {"size": 1, "sha256": ""}}',
    '{"\\ud800": {"size": 1, "sha256": ""}}',
    '{"version": 1}',
    '{"version": 1, "files": {"data.train.image_level": {"d.jsonl": {"sha256": []}}}}',
    '{"version": 1, "files": {"data.train.image_level": [1]}}',
    '{"version": [1], "files": {}}',
)
NAMES = (
    *(RECIPE_FILE, RECORD, "model", "tensorboard", "pictures", "nonfinite", ".aside", ".run.lock", "checkpoint-9"),
    *("checkpoint-0", "checkpoint-007", "checkpoint-", "checkpoint-x", "checkpoint-\u0663", "checkpoint-" + "9" * 200),
    *("damaged-checkpoint-3", "notes.txt", "checkpoint-2", "checkpoint-3"),
)
WRITTEN = (RECIPE_FILE, RECORD, ".aside", ".run.lock")  # what a run replaces, if it is a run's


def make(rng: random.Random, folder: Path) -> Trial:
    run_dir, source = folder / "run", folder / "d.jsonl"
    source.write_text("{}\n")
    settings = [f"output_dir={run_dir}", f"data.train.image_level=[{source}]", f"model.carry_over=[{folder}]"]
    recipe = load_recipe(1, overrides=settings)
    if rng.random() < 0.8:
        with owned_run(recipe, resume=False) as start:
            begin_run(recipe, start)
        for number in (1, 2, 3):
            (run_dir / f"checkpoint-{number}").mkdir()
            (run_dir / f"checkpoint-{number}" / "weights").write_text(str(number))
            saving.seal(run_dir / f"checkpoint-{number}")
    else:
        run_dir.mkdir()
    done = [_damage(rng, run_dir, source) for _ in range(rng.choice((0, 1, 1, 2, 3, 5)))]
    if rng.random() < 0.1:
        recipe = load_recipe(1, overrides=[*settings, "steps=7"])
    resume = rng.random() < 0.7
    kept, has_lock = _contents(run_dir), os.path.lexists(run_dir / ".run.lock")

    def call() -> Path | None:
        with owned_run(recipe, resume=resume) as start:
            begin_run(recipe, start)
        return start.checkpoint

    def check(checkpoint: Path | None) -> None:
        left = _contents(run_dir)
        lost = {name: text for name, text in kept.items() if text not in left.values()}
        assert not lost, f"lost {lost}"
        assert has_lock or not (run_dir / ".run.lock").exists(), "the lock was left"
        if checkpoint is not None:
            assert saving.damage(checkpoint) is None, "resumed from a damaged checkpoint"
            assert saving.entries(run_dir)[0] == checkpoint, "a newer one is in the way"

    names = ("output_dir", str(run_dir), str(source), "as at the start of the run")
    return Trial(f"{'resume' if resume else 'start'} after {done}"[:600], call, names, check)


def _damage(rng: random.Random, run_dir: Path, source: Path) -> str:
    present = [path for path in sorted(run_dir.rglob("*")) if path.is_file() and not path.is_symlink()]
    action = rng.choice(("content", "content", "content", "kind", "kind", "remove", "source", "flip"))
    if action == "source":
        source.write_text("{ }\n")
        return action
    if action == "kind" or not present:
        path = run_dir / rng.choice(NAMES)
        if os.path.lexists(path):
            path.rename(run_dir / f"moved-{len(os.listdir(run_dir))}")
        form = rng.choice(("file", "directory", "full", "fifo", "link", "broken", "loop"))
        if form == "file":
            path.write_text(rng.choice((*TEXTS, *SEALS)), errors="surrogatepass")
        elif form == "directory":
            path.mkdir()
        elif form == "full":
            path.mkdir()
            (path / "mine.txt").write_text("mine")
        elif form == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to({"link": run_dir / "checkpoint-1", "broken": "absent", "loop": path}[form])
        return f"{form} {path.name}"
    path = rng.choice(present)
    name = path.relative_to(run_dir)
    if action == "remove":
        path.unlink()
    elif action == "flip":
        content = bytearray(path.read_bytes() or b"\0")
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content[: rng.choice((None, None, len(content) // 2))])
    else:
        path.write_text(rng.choice((*TEXTS, *SEALS)), errors="surrogatepass")
    return f"{action} {name}"


def _contents(run_dir: Path) -> dict[str, bytes]:
    """Return the files that no run may lose."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {str(path.relative_to(run_dir)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if name.split("/")[0] not in WRITTEN}
