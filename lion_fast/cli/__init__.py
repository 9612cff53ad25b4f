"""The command line, `lion-fast`."""

import argparse
import sys
from collections.abc import Sequence

from lion_fast.cli import ask, convert, quickstart, train

_COMMANDS = (quickstart, convert, train, ask)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; input that cannot be used is a message on stderr and exit status 2.

    The rest of the library says what is wrong with its input by ValueError and OSError. Anything else is a bug of ours
    and shows as such, with its traceback.
    """
    parser = argparse.ArgumentParser(prog="lion-fast", description="LION: caption, answer, ground, and train.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_parsers(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"lion-fast {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
