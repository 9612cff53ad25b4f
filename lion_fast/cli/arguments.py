"""Types of arguments, which reject unusable values before anything is loaded."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch


def path_text(text: str) -> str:
    """Return the text of a path, with `~` expanded, which a shell does not do in `--option=~/path`."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """Return a path, with `~` expanded."""
    return Path(path_text(text))


def add_resuming(parser: argparse.ArgumentParser) -> None:
    """Add the options with which a training run is resumed."""
    parser.add_argument("--resume", action="store_true", help="resume from the newest undamaged checkpoint")
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="resume also if files that the run is trained on have changed since its start",
    )


class Parser(argparse.ArgumentParser):
    """A parser whose errors show an example, and whose arguments may be added when it is first used.

    Args:
        example: arguments of a useful call.
        late: adds the arguments, for those that take long to import.
    """

    def __init__(
        self,
        *args: Any,
        example: str | None = None,
        late: Callable[[argparse.ArgumentParser], None] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.example, self.late = example, late

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        self._complete()
        return super().parse_known_args(*args, **kwargs)

    def format_help(self) -> str:
        self._complete()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        example = "" if self.example is None else f"for example: {self.prog} {self.example}; "
        self.exit(2, f"{self.prog}: {message} ({example}{self.prog} --help explains its arguments)\n")

    def _complete(self) -> None:
        if self.late is not None:
            late, self.late = self.late, None
            late(self)


def expect_file(path: str | os.PathLike, name: str) -> None:
    """Raise FileNotFoundError unless a file exists, before anything is imported that takes long."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: expected a file, got a directory or nothing at {path}")


def expect_model(path: str | os.PathLike, name: str) -> None:
    """Raise ValueError unless a directory exists, before anything is imported that takes long."""
    if not os.path.isdir(path):
        raise ValueError(f"{name}: no directory {path}; make one with lion-fast quickstart or lion-fast convert")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def device(text: str) -> "torch.device":
    """Return the device of this name, which must work on this machine."""
    import torch

    try:
        found = torch.device(text)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here ({str(error).splitlines()[0]})") from error
    return found
