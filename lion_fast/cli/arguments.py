"""Types of arguments, which reject unusable values before anything is loaded."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
