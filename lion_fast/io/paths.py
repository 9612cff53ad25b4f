"""Paths given as arguments of commands."""

import argparse
import os
from pathlib import Path


def path_text(text: str) -> str:
    """Return the text of a path, with `~` expanded, which a shell does not do in `--option=~/path`."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """Return a path, with `~` expanded."""
    return Path(path_text(text))
