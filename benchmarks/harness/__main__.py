"""`python -m benchmarks.harness`: run the benchmarks, compare two runs, or write their report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import figures
from benchmarks.harness.comparison import compare, lines, missing
from benchmarks.harness.report import summary, write_report
from benchmarks.harness.results import load, load_all
from benchmarks.harness.runs import ROOT, recover, run
from lion_fast.extras import MissingExtraError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one action and return its exit status; unusable input gives a message on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness", description="Benchmarks with peers side by side."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    running = actions.add_parser("run", help="run the benchmarks and write their results")
    running.add_argument("suites", nargs="*", metavar="SUITE", help="default: all")
    running.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results")
    running.add_argument("--seconds", type=float, metavar="S", help="begin no further benchmark after S seconds")
    running.add_argument(
        "--quick", action="store_true", help="a few calls of each: shows that it runs, measures nothing"
    )
    running.set_defaults(run=_run)

    comparing = actions.add_parser("compare", help="find what became slower; the exit status is 1 where anything did")
    comparing.add_argument("before", type=Path, metavar="A", help="a folder DEVICE/DATE-COMMIT with results")
    comparing.add_argument("after", type=Path, metavar="B")
    comparing.set_defaults(run=_compare)

    reporting = actions.add_parser(
        "report", help="make the ledger, tables and charts, and the figures in the project's pages"
    )
    reporting.add_argument("--results", type=Path, metavar="DIR", help="default: benchmarks/results")
    reporting.add_argument(
        "--page",
        type=Path,
        metavar="F",
        help="write this page alone (default: docs/benchmarks.md and the figures that other pages quote)",
    )
    reporting.set_defaults(run=_report)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"python -m benchmarks.harness: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    written, status = run(args.suites, args.out, args.seconds, args.quick)
    if written is None:
        print("nothing was measured")
        return status
    for line in summary(load(written)):
        print(line)
    print(f"results: {written}")
    return status


def _compare(args: argparse.Namespace) -> int:
    before, after = load(args.before), load(args.after)
    changes = compare(before, after)
    lost = missing(before, after)
    for line in lines(changes):
        print(line)
    for entry in lost:
        print(f"MISSING {entry.group}: {entry.peer}")
    regressed = sum(change.regressed for change in changes)
    print(f"{len(changes)} times compared: {regressed} slower, {len(lost)} missing")
    return 1 if regressed or lost else 0


def _report(args: argparse.Namespace) -> int:
    results = args.results or ROOT / "benchmarks" / "results"
    for folder in recover(results):
        print(f"found what a run that died had measured: {folder}")
    page = args.page or ROOT / "docs" / "benchmarks.md"
    for file in write_report(results, page):
        print(file)
    if args.page is None:
        for file in figures.write(ROOT, load_all(results)):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
