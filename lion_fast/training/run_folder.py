"""The directory of a run: one process owns it, no file of the user's is replaced, a run resumes only as it began."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lion_fast.io.atomic import write_text
from lion_fast.io.owning import OutputInUseError, made_directories, sole_writer
from lion_fast.io.reading import read_content, shown
from lion_fast.training import saving
from lion_fast.training.fingerprints import RECORD, Fingerprints, expect_same_files, fingerprints_of, write_fingerprints
from lion_fast.training.recipe import Recipe, RecipeError, check_resumable, dump_recipe
from lion_fast.training.settings_files import read_settings

RECIPE_FILE = "recipe.yaml"
MODEL = "model"
_DIRECTORIES = (MODEL, saving.ASIDE, "tensorboard", "pictures", "nonfinite")
_KEYS = {"stage", "output_dir", "model", "data", "optimizer", "batch", "steps"}  # of every version's recipe
Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Args:
        resume: whether an earlier start of the run may be continued.
        checkpoint: checkpoint to resume from; None for the start of the run.
        fingerprints: of the files that the run is trained on.
    """

    resume: bool
    checkpoint: Path | None
    fingerprints: Fingerprints


def on_first_process(first: bool, broadcast: Callable[[list[Any]], object], function: Callable[[], Result]) -> Result:
    """Return the result of `function` on the first process, or raise its error, on all processes.

    Args:
        first: whether this is the first process.
        broadcast: replaces the items of a list by those of the first process.
    """
    outcome: list[Any] = [None, None]
    if first:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    broadcast(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def owned_directory(directory: Path) -> Iterator[None]:
    """Own the directory `output_dir`, which is made if there is none.

    The lock is the kernel's and belongs to this process, so it ends with the process, however that ends.

    Raises:
        OutputInUseError: another run owns it.
        FileExistsError: it is a file.
        OSError: it cannot be written.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise FileExistsError(f"output_dir: expected a directory, got a file or a broken link, {shown(str(directory))}")
    with ExitStack() as stack:
        try:
            stack.enter_context(made_directories(directory))
            # A fixed name: the directory may have another name for another process.
            stack.enter_context(sole_writer(Path(os.path.realpath(directory)) / "run", "output_dir"))
        except OutputInUseError as error:
            raise OutputInUseError(
                f"output_dir: expected a directory that no other run is using, got {directory}"
            ) from error
        except OSError as error:
            if error.filename is not None:
                error.filename = str(directory)
            raise
        yield


@contextmanager
def owned_run(
    recipe: Recipe, *, resume: bool, reads_sources: bool = True, allow_changed_data: bool = False
) -> Iterator[Start]:
    """Own the run's directory, and check that the run can start or resume in it; nothing is written or removed yet.

    Args:
        reads_sources: whether the run reads the training data that the recipe names.
        allow_changed_data: whether files that the run is trained on may have changed since its start.

    Raises:
        OutputInUseError, FileExistsError: see `owned_directory`.
        RecipeError: the directory holds checkpoints or a model and `resume` is False, or checkpoints of another recipe
            or of other data, or files that no run wrote.
        OSError: the directory cannot be written.
    """
    run_dir = Path(recipe.output_dir)
    with owned_directory(run_dir):
        _expect_own(run_dir, resume)
        checkpoint = None
        if resume:
            if (run_dir / RECIPE_FILE).is_file():
                check_resumable(read_settings(run_dir / RECIPE_FILE), recipe.plain())
            checkpoint = saving.last_complete(run_dir)
        found = fingerprints_of(recipe, reads_sources)
        if checkpoint is not None:
            expect_same_files(run_dir, found, allow_changed_data)
        yield Start(resume, checkpoint, found)


def begin_run(recipe: Recipe, start: Start) -> None:
    """Write the run's settings and fingerprints, and put checkpoints that it will write again out of the way."""
    run_dir = Path(recipe.output_dir)
    saving.clear_aside(run_dir)
    write_text(run_dir / RECIPE_FILE, dump_recipe(recipe))
    write_fingerprints(run_dir, start.fingerprints)
    if not start.resume:
        return
    print(f"resuming from {start.checkpoint or 'the start: there is no undamaged checkpoint'}")
    for path in saving.entries(run_dir):
        if path == start.checkpoint:
            break
        saving.set_aside(path)


def _expect_own(run_dir: Path, resume: bool) -> None:
    """Check that a directory holds nothing that the run would replace, except what this run wrote.

    Raises:
        RecipeError: it does.
    """
    checkpoints = saving.entries(run_dir)
    if checkpoints and not resume:
        raise RecipeError(
            f"output_dir: expected a directory without checkpoints, got {run_dir}; resume the run, or use another "
            "directory"
        )
    for name in _DIRECTORIES:
        path = run_dir / name
        if os.path.lexists(path) and not path.is_dir():
            raise RecipeError(f"output_dir: expected a directory at {path}, or nothing, got a file or a broken link")
    for name in (RECIPE_FILE, RECORD):
        path = run_dir / name
        if os.path.lexists(path) and not path.is_file():  # writing to a pipe could block forever
            raise RecipeError(
                f"output_dir: expected a file at {path}, or nothing, got a directory, a pipe or a broken link"
            )
    begun = run_dir / RECIPE_FILE
    names = (RECIPE_FILE, *(path.name for path in checkpoints), *_DIRECTORIES)
    present = [name for name in names if os.path.lexists(run_dir / name)]
    if present and not (begun.is_file() and _is_of_a_run(begun, resume)):
        raise RecipeError(
            f"output_dir: expected the directory of a run, or one without {present[0]}, got {run_dir}, which has no "
            f"{RECIPE_FILE} that a run wrote"
        )
    if MODEL in present and not resume:
        raise RecipeError(
            f"output_dir: expected a directory without {MODEL}, the result of a run, got {run_dir}; use another one"
        )


def _is_of_a_run(begun: Path, resume: bool) -> bool:
    settings = read_settings(begun)
    # A new run replaces the file, so it must not be one that the user has written and commented.
    written = resume or read_content(begun) == yaml.safe_dump(settings, sort_keys=False).encode()
    return settings.keys() >= _KEYS and written
