"""The command line, as `lion-fast` and as `python -m lion_fast`."""

import sys

from lion_fast.interrupts import leave_until_a_command_runs


def main() -> int:
    leave_until_a_command_runs()
    from lion_fast.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
