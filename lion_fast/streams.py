"""Standard input, output and errors of a command: closed ones are harmless, and a reader that leaves is no error."""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

BROKEN_PIPE = 128 + 13
"""Exit status of a command whose reader has gone, as if SIGPIPE had ended it."""


def prepare() -> None:
    """Open the null device for standard streams that are closed, and let every text be printed.

    Otherwise a file that the command writes gets the number of the closed stream, and messages of libraries land in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # which has the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    # An answer, or a name of a file, that the terminal's encoding lacks must not end a command that has done its work.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Write what was printed, and end the process if the output cannot take it: quietly if its reader has gone.

    Raises:
        SystemExit: the output has gone or is full.
    """
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            # What is still in the buffer would fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                sys.exit(BROKEN_PIPE)
            print(f"lion-fast: standard output: {error.strerror}", file=sys.stderr)
            sys.exit(2)


def reader_has_gone(error: OSError) -> bool:
    """Return whether an error says that nobody reads standard output any more."""
    if not isinstance(error, BrokenPipeError) or error.filename is not None:
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file of the system
        return False
    return bool(poll.poll(0))  # of what is not asked for, only an error or the other end's leaving is reported


def message_of(error: BaseException) -> str:
    """Return an error's message with line breaks and control characters escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(error))


def report(out: str | os.PathLike, summary: str) -> None:
    """Print what was written to `out`: on standard error if `out` is itself a stream, whose content it would join."""
    from lion_fast.io.owning import is_stream
    from lion_fast.io.reading import on_one_line

    print(f"{on_one_line(out)}: {summary}", file=sys.stderr if is_stream(Path(out)) else sys.stdout)
