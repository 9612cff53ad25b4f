"""`lion-fast check`: the kernels against the reference, on this machine."""

import argparse
from importlib.util import find_spec
from pkgutil import iter_modules

from lion_fast.cli.arguments import device, path, positive_int
from lion_fast.cli.loading import importing

DTYPES = ("float32", "float16", "bfloat16")
INTERPRETED = """\
The kernels run in Triton's interpreter, on the CPU. Their results are checked; times are not printed, because the
interpreter's times mean nothing. bfloat16 is not run, because the interpreter does not compute it correctly."""


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check",
        help="compare the kernels with the reference on this machine",
        example="--operators rms_norm",
        description="Compare the Triton kernels of every operator, forward and all gradients, with the reference in "
        "fp64. On a GPU, also print times and their lower bounds; without one, run in Triton's interpreter. The exit "
        "status is 1 if any error is out of bounds.",
    )
    parser.add_argument("--operators", nargs="+", metavar="NAME", help=f"{', '.join(operators())} (default: all)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: all supported)"
    )
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
    parser.add_argument("--json", type=path, metavar="F", help="write all results to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json if it exists")
    parser.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="compare N cases in parallel (default: 1)"
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        metavar="N",
        help="equal calls that must give equal bits, at most 20 at the largest shapes (default: 200; 2 at those shapes "
        "and in the interpreter)",
    )
    parser.add_argument("--no-times", dest="times", action="store_false", help="do not measure times on a GPU")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lion_fast.io.owning import expect_free

    known = operators()
    unknown = sorted(set(args.operators or ()) - set(known))
    if unknown:
        raise ValueError(f"--operators: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if args.json is not None:
        expect_free(args.json, "--json", overwrite=args.overwrite)
    with importing():
        import torch

    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device}")
    interpret = device.type == "cpu"
    if interpret and "bfloat16" in (args.dtypes or ()):
        raise ValueError("--dtypes: bfloat16 needs a GPU, because Triton's interpreter does not compute it correctly")
    from lion_fast.cli.processes import kernels_can_be, run_again

    with importing():
        can_be = kernels_can_be(interpreted=interpret)
        from lion_fast.check.cases import OPERATORS
        from lion_fast.check.report import run_check
        from lion_kernels import HAS_TRITON

    if not HAS_TRITON:
        raise ValueError("triton cannot be imported here, so no kernel runs")
    if not can_be:
        return run_again(args, interpret=interpret)

    if interpret:
        print(INTERPRETED)
    else:
        if device.index is not None:
            torch.cuda.set_device(device)
        print(f"The kernels run compiled, on {torch.cuda.get_device_name(device)}.")
    names = args.dtypes or [name for name in DTYPES if not (interpret and name == "bfloat16")]
    dtypes = [getattr(torch, name) for name in names]
    how = {"processes": args.processes, "repeats": args.repeats, "times": args.times}
    check = run_check(args.operators or OPERATORS, dtypes, device, args.json, **how)
    return 1 if check.problems else 0


def operators() -> list[str]:
    """Return the names of the operators, each of which is a module of lion_kernels, without importing them."""
    package = find_spec("lion_kernels")
    folders = None if package is None else package.submodule_search_locations
    return [found.name for found in iter_modules(folders) if not found.ispkg and not found.name.startswith("_")]
