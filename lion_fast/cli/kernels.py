"""`lion-fast kernels`: compile the kernels ahead of time, for GPUs that need not be present."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lion_kernels.core.specs import KernelSpec


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    commands.add_parser(
        "kernels",
        help="compile the kernels ahead of time, for GPUs that need not be present, and report the result",
        example="--targets sm_90",
        description="Compile every kernel and configuration ahead of time and print registers, stack, shared memory, "
        "matrix instructions and widths of memory accesses by architecture. For sm_90, also print the launches that "
        "check and the model make, with the instructions of their main loops. The exit status is 1 if a kernel spills, "
        "does not fit, does not use the matrix units or waits for each of their instructions, unless that is known.",
        late=_add_arguments,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from lion_kernels.aot.report import add_arguments

    add_arguments(parser)
    parser.add_argument(
        "--without-launches",
        action="store_true",
        help="only the configurations that the kernels list, as python -m lion_kernels does",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lion_fast.cli.processes import kernels_can_be, run_again

    compiles = kernels_can_be(interpreted=False)
    from lion_kernels import HAS_TRITON
    from lion_kernels.aot.compile import selected_specs
    from lion_kernels.aot.report import print_report

    if not HAS_TRITON:
        raise ValueError("triton cannot be imported here, so nothing compiles")
    if compiles:
        return min(print_report(args, _recorded(args)), 1)
    selected_specs(args.modules, only_one_each=False)  # names unknown modules before another process starts
    return run_again(args, interpret=False)


def _recorded(args: argparse.Namespace) -> "list[KernelSpec]":
    """Return the launches recorded for sm_90, if that target and all modules are selected."""
    from lion_kernels.aot.report import one_each_on

    if args.without_launches or args.modules or "sm_90" in one_each_on(args) or "sm_90" not in args.targets:
        return []
    from lion_fast.check.model_launches import recorded_launches

    return recorded_launches()
