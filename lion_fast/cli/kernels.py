"""`lion-fast kernels`: what the compiler makes of the kernels, on GPUs that need not be here."""

import argparse


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from lion_kernels.aot import add_arguments

    parser = commands.add_parser(
        "kernels",
        help="compile the kernels for GPUs that need not be here, and report what came of it",
        description="Compile every kernel and configuration ahead of time and print its registers, stack, shared "
        "memory, matrix instructions and widths of memory accesses by architecture. The exit status is 1 where a "
        "kernel spills, does not fit, or misses the matrix units. The same as python -m lion_kernels.",
    )
    add_arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lion_fast.cli.processes import run_again
    from lion_kernels.aot import print_report
    from lion_kernels.backend import HAS_TRITON, interpreting

    if not HAS_TRITON:
        raise ValueError("triton cannot be imported here, so nothing compiles")
    if not interpreting():
        return min(print_report(args), 1)
    argv: list[object] = ["kernels", "--targets", *args.targets]
    argv += ["--modules", *args.modules] if args.modules else []
    argv += ["--one-each"] if args.one_each else []
    argv += ["--json", args.json] if args.json else []
    argv += ["--page", args.page] if args.page else []
    return run_again(argv, interpret=False)
