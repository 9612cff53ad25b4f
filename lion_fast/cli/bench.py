"""`lion-fast bench`: run the benchmarks, compare two runs, make the report, tune the kernels."""

import argparse
from pathlib import Path


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="run and compare benchmarks, make their report, tune the kernels",
        description="Benchmarks with peers side by side. `run` needs a clone of the project, the rest needs results.",
    )
    parser.add_argument("--tune", action="store_true", help="find the tile sizes that are fastest on this GPU")
    parser.add_argument("--dry-run", action="store_true", help="with --tune: show what it would try, on a CPU")
    parser.add_argument("--table", type=Path, metavar="F", help="with --tune: write here (default: the kernels' table)")
    parser.add_argument("--tune-seconds", type=float, default=400.0, metavar="S", help="default: %(default)s")
    parser.set_defaults(run=_tune)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")

    run = actions.add_parser("run", help="run the benchmarks and write their results")
    run.add_argument("suites", nargs="*", metavar="SUITE", help="default: all")
    run.add_argument("--out", type=Path, metavar="DIR", help="default: the clone's benchmarks/results")
    run.add_argument("--seconds", type=float, metavar="S", help="begin no further benchmark after S seconds")
    run.add_argument("--quick", action="store_true", help="a few calls of each: shows that it runs, measures nothing")
    run.set_defaults(run=_run)

    compare = actions.add_parser("compare", help="find what became slower; the exit status is 1 where anything did")
    compare.add_argument("before", type=Path, metavar="A", help="a folder DEVICE/DATE-COMMIT with results")
    compare.add_argument("after", type=Path, metavar="B")
    compare.set_defaults(run=_compare)

    report = actions.add_parser(
        "report", help="make the ledger, tables and charts, and the figures in the clone's pages"
    )
    report.add_argument("--results", type=Path, metavar="DIR", help="default: the clone's benchmarks/results")
    report.add_argument(
        "--page",
        type=Path,
        metavar="F",
        help="write this page alone (default: the clone's, and the figures that its README and other pages quote)",
    )
    report.set_defaults(run=_report)


def _run(args: argparse.Namespace) -> int:
    from lion_fast.bench.report import summary
    from lion_fast.bench.results import load
    from lion_fast.bench.runs import run

    written, status = run(args.suites, args.out, args.seconds, args.quick)
    if written is None:
        print("nothing was measured")
        return status
    for line in summary(load(written)):
        print(line)
    print(f"results: {written}")
    return status


def _compare(args: argparse.Namespace) -> int:
    from lion_fast.bench.comparison import compare, lines, missing
    from lion_fast.bench.results import load

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


def _report(args: argparse.Namespace) -> None:
    from lion_fast.bench import figures
    from lion_fast.bench.report import write_report
    from lion_fast.bench.results import load_all
    from lion_fast.bench.runs import clone, recover

    results = args.results or clone() / "benchmarks" / "results"
    for folder in recover(results):
        print(f"found what a run that died had measured: {folder}")
    page = args.page or clone() / "docs" / "benchmarks.md"
    for file in write_report(results, page):
        print(file)
    if args.page is None:
        for file in figures.write(clone(), load_all(results)):
            print(file)


def _tune(args: argparse.Namespace) -> int:
    if not args.tune:
        raise ValueError("expected run, compare, report or --tune; see lion-fast bench --help")
    from lion_fast.bench.tuning import run
    from lion_fast.cli.processes import run_again
    from lion_kernels.core.backend import HAS_TRITON, interpreting

    if not HAS_TRITON:
        raise ValueError("triton cannot be imported here, so there is nothing to tune")
    if args.dry_run and not interpreting():
        return run_again(["bench", "--tune", "--dry-run"], interpret=True)
    run(args.table, args.tune_seconds, args.dry_run)
    return 0
