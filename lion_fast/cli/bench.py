"""`lion-fast bench --tune`: find the kernels' fastest tile sizes on this GPU."""

import argparse

from lion_fast.cli.arguments import path

_MOVED = "run, compare and report are now `python -m benchmarks.harness`, in a clone of the project"


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="tune the kernels for this GPU",
        example="--tune",
        description=f"Tune the kernels for this GPU. The benchmarks' {_MOVED}.",
    )
    parser.add_argument("--tune", action="store_true", help="find the fastest tile sizes for this GPU")
    parser.add_argument("--dry-run", action="store_true", help="with --tune: list what would be tried; works on a CPU")
    parser.add_argument(
        "--table", type=path, metavar="F", help="with --tune: output file (default: the kernels' table)"
    )
    parser.add_argument(
        "--tune-seconds", type=float, default=400.0, metavar="S", help="time limit (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --table if it exists")
    parser.add_argument("moved", nargs="*", metavar="ACTION", help=argparse.SUPPRESS)
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    if args.moved:
        raise ValueError(f"{args.moved[0]}: {_MOVED}")
    if not args.tune:
        raise ValueError("expected --tune; see lion-fast bench --help")
    from lion_fast.cli.processes import kernels_can_be, run_again

    interprets = args.dry_run and kernels_can_be(interpreted=True)
    from lion_fast.io.owning import expect_free
    from lion_kernels import HAS_TRITON

    if args.table is not None:
        expect_free(args.table, "--table", overwrite=args.overwrite)
    if not HAS_TRITON:
        raise ValueError("triton cannot be imported here, so there is nothing to tune")
    if args.dry_run and not interprets:
        return run_again(args, interpret=True)
    from lion_fast.check.tuning import run

    run(args.table, args.tune_seconds, args.dry_run)
    return 0
