"""The command line, as `lion-fast` and as `python -m lion_fast`."""

import sys

from lion_fast.interrupts import leave_until_a_command_runs
from lion_fast.streams import flushed, prepare


def main() -> int:
    leave_until_a_command_runs()
    prepare()
    from lion_fast.cli import main

    with flushed():
        return main()


if __name__ == "__main__":
    sys.exit(main())
