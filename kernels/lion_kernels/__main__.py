"""`python -m lion_kernels`: the ahead-of-time report (see `lion_kernels.aot.report`)."""

import sys

from lion_kernels.aot.report import main

if __name__ == "__main__":
    sys.exit(min(main(), 1))
