"""Ctrl-C: exit status 130 without a traceback, at any moment."""

import os
import signal
import sys
from types import FrameType
from typing import Any

STATUS = 130


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once."""
    os._exit(STATUS)


def leave_until_a_command_runs() -> None:
    """End the process at Ctrl-C, while modules are imported and arguments parsed: there is nothing to clean up."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as after nohup
        signal.signal(signal.SIGINT, leave)


def raise_from_now_on() -> None:
    """Raise KeyboardInterrupt at Ctrl-C, so that the command removes what is unfinished."""
    if signal.getsignal(signal.SIGINT) is leave:
        sys.unraisablehook = _unraisable
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_from_now_on() -> None:
    """Ignore further Ctrl-C while the process ends."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unraisable(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):  # Python would print it and go on
        os._exit(STATUS)
    sys.__unraisablehook__(unraisable)
