"""Options that the commands which train share."""

import argparse


def add_resuming(parser: argparse.ArgumentParser) -> None:
    """Add the options with which a training run is resumed."""
    parser.add_argument("--resume", action="store_true", help="resume from the newest undamaged checkpoint")
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="resume also if files that the run is trained on have changed since its start",
    )
