"""The command line, `lion-fast`."""

import logging
import os
import sys
from collections.abc import Sequence

from lion_fast import interrupts, streams
from lion_fast.cli import (
    ask,
    bench,
    check,
    convert,
    data,
    demo,
    kernels,
    memory,
    quickstart,
    tag,
    train,
)
from lion_fast.cli.arguments import Parser
from lion_fast.extras import MissingExtraError

_COMMANDS = (quickstart, convert, data, train, memory, ask, tag, demo, check, kernels, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 by default, 2 for unusable input, with a message on stderr.

    The library raises ValueError and OSError for unusable input, and MissingExtraError for a package that is not
    installed. Any other exception is a bug and propagates with its traceback.
    """
    _quieten_libraries()
    try:
        os.getcwd()
    except FileNotFoundError:
        print("lion-fast: the working directory no longer exists; change to another", file=sys.stderr)
        return 2
    description = "LION: caption, answer, locate, and train."
    parser = Parser(prog="lion-fast", description=description, example="quickstart")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_parsers(commands)
    try:
        args = parser.parse_args(argv)  # may import PyTorch, to check a device
        args.argv = sys.argv[1:] if argv is None else argv
        interrupts.raise_from_now_on()
        try:
            return args.run(args) or 0
        except (ValueError, OSError, MissingExtraError) as error:
            if isinstance(error, OSError) and streams.reader_has_gone(error):
                return streams.BROKEN_PIPE
            print(f"lion-fast {args.command}: {streams.message_of(error)}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        if argv is None:
            interrupts.ignore_from_now_on()
        return interrupts.STATUS


def _quieten_libraries() -> None:
    """Let the libraries that commands use print what concerns the user."""
    os.environ.setdefault("TQDM_DELAY", "1")  # no progress bars of less than a second
    # bitsandbytes reports that it found no optional kernels of its own, whether or not anything is quantized.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
