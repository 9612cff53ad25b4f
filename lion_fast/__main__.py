"""`python -m lion_fast`: the command line where the package is not installed."""

import sys

from lion_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
