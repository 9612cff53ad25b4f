"""`python -m benchmarks.claims`: rerun the paper's claims at small scale."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims import run
from lion_fast.extras import MissingExtraError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; unusable input gives a message on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description="Train small LIONs on generated scenes with and without what the paper claims to help, about ten "
        "CPU minutes a seed, and write a table and a chart of what it brought. A stopped run resumes.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/claims"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--from",
        dest="frozen_from",
        type=Path,
        default=Path("runs/quickstart/checkpoint"),
        metavar="DIR",
        help="the quickstart's checkpoint, whose stand-ins all share (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="two to ten (default: 0 1 2)"
    )
    args = parser.parse_args(argv)
    try:
        run(args.output, args.frozen_from, seeds=args.seeds)
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"python -m benchmarks.claims: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
