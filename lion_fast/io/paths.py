"""Paths given as arguments of commands."""

import argparse
import os
from pathlib import Path


def expanded(text: str) -> str:
    """Return a path or a pattern with `~` expanded, which a shell does not do in `--option=~/path` and in quotes."""
    found = os.path.expanduser(text)
    if found.startswith("~") and not os.path.lexists(found):  # must not become the name of a new file
        raise argparse.ArgumentTypeError(f"expected the name of a user after ~, got {text!r}")
    return found


def path_text(text: str) -> str:
    """Return the text of a path, with `~` expanded."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return expanded(text)


def path(text: str) -> Path:
    """Return a path, with `~` expanded."""
    return Path(path_text(text))
