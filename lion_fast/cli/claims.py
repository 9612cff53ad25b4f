"""`lion-fast claims`: rerun the paper's claims at small scale."""

import argparse
from pathlib import Path


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "claims",
        help="rerun the paper's claims on generated scenes, about ten CPU minutes a seed",
        description="Train small LIONs on generated scenes with and without what the paper claims to help, and write "
        "a table and a chart of what it brought. Stopped, it goes on where it was.",
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
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from lion_fast.claims import run

    run(args.output, args.frozen_from, seeds=args.seeds)
