"""Types of arguments, which reject unusable values before anything is loaded."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from lion_fast.io.paths import expanded, path, path_text
from lion_fast.training.options import add_resuming

if TYPE_CHECKING:
    import torch

__all__ = [
    "Parser",
    "add_resuming",
    "device",
    "expanded",
    "expect_file",
    "expect_model",
    "path",
    "path_text",
    "positive_int",
]


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


def expect_model(
    path: str | os.PathLike, name: str, made_by: str = "lion-fast quickstart or lion-fast convert"
) -> None:
    """Raise ValueError unless a directory exists, before anything is imported that takes long."""
    if not os.path.isdir(path):
        raise ValueError(f"{name}: no directory {path}; make one with {made_by}")


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
