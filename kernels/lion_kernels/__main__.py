"""`python -m lion_kernels`: the ahead-of-time report (see `lion_kernels.aot_report`)."""

import sys

from lion_kernels.aot_report import main

if __name__ == "__main__":
    sys.exit(min(main(), 1))
