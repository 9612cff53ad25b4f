"""Running trials of hostile inputs, each of which may only succeed or end in a clear error.

A boundary is a module of this folder with `make(rng, folder)`, which returns a `Trial`: one call of the library with an
input drawn from `rng`. A trial is good if its call returns (and its `check`, if any, passes), or raises one of the
exceptions that the library documents for unusable input, with a message of one line that contains one of `names`: the
argument or file that is at fault. Everything else is a bad outcome: another exception, a message that names nothing,
more than `SECONDS` or `MEMORY`, or the death of the process.

Trials run in child processes, so that a hang, a crash or exhausted memory is the outcome of one trial and ends nothing.
"""

import importlib
import multiprocessing
import random
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 20
MEMORY = 1 << 30
_MESSAGE = 1000  # characters
_SPARE = 4 << 30  # address space that a trial may take before the kernel refuses it more

REFUSALS: tuple[type[Exception], ...] = (ValueError, TypeError, OSError)


@dataclass(frozen=True)
class Trial:
    """One call with a hostile input.

    Args:
        description: the input in one line, enough to make a regression test from.
        call: calls the library; made new for each trial.
        names: texts of which an error's message contains at least one, such as the argument and the file.
        check: gets what `call` returned, and raises AssertionError for a silent wrong result.
        refusals: exceptions that the boundary documents for unusable input.
    """

    description: str
    call: Callable[[], Any]
    names: Sequence[str]
    check: Callable[[Any], None] | None = None
    refusals: tuple[type[Exception], ...] = REFUSALS


@dataclass(frozen=True)
class Bad:
    """A bad outcome, which `run_trial(boundary, seed)` repeats."""

    boundary: str
    seed: int
    description: str
    reason: str

    def __str__(self) -> str:
        return f"{self.boundary}, seed {self.seed}: {self.description}\n    {self.reason}"


def run_campaign(boundary: str, seeds: Sequence[int]) -> list[Bad]:
    """Run one trial for each seed in child processes, and return the bad outcomes."""
    bad: list[Bad] = []
    left = list(seeds)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.lion_fast.warm", f"tests.campaign.{boundary}"])
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_all, args=(boundary, left, sender), daemon=True)
        process.start()
        sender.close()
        seed, description = left[0], "not begun"
        try:
            while receiver.poll(4 * SECONDS):
                kind, value = receiver.recv()
                if kind == "begin":
                    seed, description = value
                else:
                    left.remove(seed)
                    bad += [] if value is None else [value]
                    if not left:
                        break
            else:
                raise EOFError("no answer")
        except EOFError as error:
            process.kill()
            process.join()
            if seed not in left:  # it died while it made the next trial
                seed, description = left[0], "not begun"
            reason = str(error) or f"the process died with exit code {process.exitcode}"
            bad.append(Bad(boundary, seed, description, reason))
            left = [other for other in left if other != seed]  # the process may also die after the trial's end
        process.join()
        receiver.close()
    return bad


def run_trial(boundary: str, seed: int) -> Bad | None:
    """Run one trial in this process."""
    make = importlib.import_module(f"tests.campaign.{boundary}").make
    with tempfile.TemporaryDirectory() as folder:
        trial = make(random.Random(f"{boundary} {seed}"), Path(folder))
        reason = _outcome(trial)
    return None if reason is None else Bad(boundary, seed, trial.description, reason)


def _run_all(boundary: str, seeds: Sequence[int], sender: Any) -> None:
    signal.signal(signal.SIGALRM, _too_slow)
    make = importlib.import_module(f"tests.campaign.{boundary}").make
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _SPARE, hard))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            sender.send(("begin", (seed, "the generator")))
            trial = make(random.Random(f"{boundary} {seed}"), Path(folder))
            sender.send(("begin", (seed, trial.description)))
            _reset_peak()
            before = _status("VmHWM")
            signal.alarm(SECONDS)
            try:
                reason = _outcome(trial)
            finally:
                signal.alarm(0)
            grown = _status("VmHWM") - before
            if reason is None and grown > MEMORY:
                reason = f"took {grown >> 20} MiB of memory"
            sender.send(("end", None if reason is None else Bad(boundary, seed, trial.description, reason)))


class _TooSlow(BaseException):
    pass


def _too_slow(number: int, frame: Any) -> None:
    raise _TooSlow


def _outcome(trial: Trial) -> str | None:
    """Return why the trial's outcome is bad, or None."""
    try:
        result = trial.call()
    except trial.refusals as error:
        message = str(error)
        if isinstance(error, UnicodeError | RecursionError):
            return f"{type(error).__name__}: {message[:200]} ({_where(error)})"
        if "\n" in message or len(message) > _MESSAGE:
            lines = message.count("\n") + 1
            return f"{type(error).__name__} of {lines} lines, {len(message)} characters: {message[:200]!r}"
        if not any(name in message for name in trial.names):
            return f"{type(error).__name__} names none of {list(trial.names)}: {message} ({_where(error)})"
        return None
    except _TooSlow:
        return f"took more than {SECONDS} seconds"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]} ({_where(error)})"
    if trial.check is not None:
        try:
            trial.check(result)
        except AssertionError as error:
            return f"wrong result: {error}"
    return None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])


def _status(name: str) -> int:
    """Return a size of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
