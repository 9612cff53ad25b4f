"""Fingerprints of the files that a run is trained and evaluated on, which show at its resumption what has changed.

`lion_fast.io.digests` says what is hashed whole. Image files that JSON lines name are not looked at.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lion_fast.configuration_lion import TASKS
from lion_fast.io.atomic import write_json
from lion_fast.io.digests import SAMPLED, digest_of
from lion_fast.io.reading import read_content
from lion_fast.training.recipe import SCENES, Recipe, RecipeError

RECORD = "trained_on.json"
Fingerprints = dict[str, dict[str, dict[str, Any]]]  # key of the recipe -> file -> size and digest

_VERSION = 1
_OF_A_DIRECTORY = (*SAMPLED, ".json", ".txt", ".model", ".npz", ".jinja")
_EVALUATION = "data.evaluate."
_SHOWN = 3

logger = logging.getLogger(__name__)


def fingerprints_of(recipe: Recipe, reads_sources: bool = True) -> Fingerprints:
    """Return the fingerprints of a recipe's data, tagger and initial models.

    Args:
        reads_sources: whether the run reads the training data that the recipe names.

    Raises:
        OSError: a file cannot be read; what does not exist is left out.
    """
    model, data = recipe.model, recipe.data
    named: dict[str, list[str | None]] = {
        "model.frozen_from": [model.frozen_from],
        "model.qformer_from": [model.qformer_from],
        "model.carry_over": [*model.carry_over],
    }
    if reads_sources:
        named |= {f"data.train.{task}": getattr(data.train, task) for task in TASKS}
        named |= {f"{_EVALUATION}{task}": getattr(data.evaluate, task) for task in TASKS}
        named["data.tagger"] = [data.tagger]
    return {
        key: {str(file): _fingerprint(file) for name in names if name for file in _files(name)}
        for key, names in named.items()
        if any(names)
    }


def write_fingerprints(run_dir: Path, found: Fingerprints) -> None:
    write_json(run_dir / RECORD, {"version": _VERSION, "files": found})


def expect_same_files(run_dir: Path, found: Fingerprints, allow_changes: bool = False) -> None:
    """Check that files are as they were at the start of the run in `run_dir`, or log what has changed.

    Raises:
        RecipeError: a file has changed, is missing or is new, or the run's record cannot be read, unless
            `allow_changes`; the message names the file.
    """
    problem = _difference(run_dir / RECORD, found)
    if problem is None:
        return
    if not allow_changes:
        raise RecipeError(f"{problem}; to resume nevertheless, pass --allow-changed-data (allow_changed_data=True)")
    logger.warning("resuming with other data: %s", problem)


def _difference(record: Path, found: Fingerprints) -> str | None:
    """Return the first differences between a run's record and the files now, or None."""
    if not record.is_file():
        logger.warning(
            "%s is missing, as in runs of earlier versions: nothing shows whether the data are those of the start",
            record,
        )
        return None
    try:
        read = json.loads(read_content(record))
        before = {(key, file): marks["sha256"] for key, files in read["files"].items() for file, marks in files.items()}
        version = read["version"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{record}: not a record of the files that a run is trained on ({type(error).__name__})"
    if version != _VERSION:
        return f"{record}: expected version {_VERSION}, got {str(version)[:20]}"
    after = {(key, file): marks["sha256"] for key, files in found.items() for file, marks in files.items()}
    # Earlier versions did not record the data of evaluation.
    after = {name: digest for name, digest in after.items() if name[0] in read["files"] or _EVALUATION not in name[0]}
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not different:
        return None
    key, file = different[0]
    now = "a changed one" if (key, file) in before.keys() & after.keys() else "a new one"
    now = now if (key, file) in after else "none"
    others = ", ".join(file for _, file in different[1 : 1 + _SHOWN])
    more = f" and {others}" if others else ""
    more += f" and {len(different) - 1 - _SHOWN} more" if len(different) > 1 + _SHOWN else ""
    return f"{key}: expected {file}{more} as at the start of the run, got {now}"


def _files(name: str) -> Iterator[Path]:
    """Yield the files of a source of data, or of a model's directory."""
    path = Path(name)
    if name.startswith(SCENES):
        return
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.suffix in _OF_A_DIRECTORY and file.is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": digest_of(file)}
