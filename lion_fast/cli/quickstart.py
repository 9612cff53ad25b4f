"""`lion-fast quickstart`: train a small LION in three stages, and show the results."""

import argparse
from pathlib import Path

from lion_fast.cli.arguments import path
from lion_fast.cli.loading import importing


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "quickstart",
        help="train a small LION on generated scenes, in minutes on a CPU",
        example="--output runs/quickstart",
        description="Train a small LION through the paper's three stages on generated scenes; nothing is downloaded.",
    )
    parser.add_argument(
        "--output", type=path, default=Path("runs/quickstart"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and weights (default: %(default)s)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply the number of training steps by X (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    with importing():
        from lion_fast.quickstart import run

    run(args.output, seed=args.seed, scale=args.scale)
