"""The ahead-of-time report: every kernel compiled, with the compiler's results and the complaints about them.

    python -m lion_kernels

prints, for every kernel and shipped configuration in the operators' `kernel_specs()`, its registers, stack, shared
memory, matrix instructions and widths of accesses to global memory on each target, and on sm_90 the composition of its
main loop. `lion-fast kernels` adds recorded launches. Both fail on complaints of `lion_kernels.aot.gate` that are not
known.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lion_kernels.aot.compile import RECORDED, TARGETS, Report, compile_kernel, configuration, selected_specs
from lion_kernels.aot.gate import KNOWN, Complaint, check, not_found
from lion_kernels.aot.page import page
from lion_kernels.core.backend import interpreting
from lion_kernels.core.specs import KernelSpec


class Task(NamedTuple):
    """One kernel to compile for one target."""

    module: str
    spec: KernelSpec
    target: str


# Shared by the compiling processes, which inherit it, because kernels cannot be pickled.
_TASKS: list[Task] = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select a part of the report."""
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="modules to compile (default: all)")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument(
        "--one-each",
        nargs="*",
        choices=list(TARGETS),
        metavar="TARGET",
        help="one configuration of each kernel and type only, for these targets (default: for all)",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile (default: 1)")
    parser.add_argument("--json", type=Path, metavar="F", help="write configurations, reports and complaints here too")
    parser.add_argument("--page", type=Path, metavar="F", help="write the report as a page of Markdown")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --json and --page if they exist")


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m lion_kernels`: print the report and return the number of unknown complaints."""
    parser = argparse.ArgumentParser(prog="python -m lion_kernels", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return print_report(options)
    except (FileExistsError, IsADirectoryError) as error:
        parser.error(str(error))


def print_report(options: argparse.Namespace, recorded: Sequence[KernelSpec] = ()) -> int:
    """Compile the specs that `options` (of `add_arguments`) select, and the `recorded` launches for sm_90.

    Returns:
        The number of unknown complaints.

    Raises:
        ValueError: one of the modules has no kernels.
        FileExistsError, IsADirectoryError: a file to write exists with content, without `--overwrite`, or is a
            directory; nothing is compiled.
        RuntimeError: the process interprets its kernels.
    """
    if interpreting():
        raise RuntimeError("kernels are interpreted in this process; run it without TRITON_INTERPRET")
    for name, path in (("--json", options.json), ("--page", options.page)):
        if path is not None:
            _expect_free(name, path, options.overwrite)
    tasks = _tasks(options, recorded)
    print(f"triton {version('triton')}")
    print(f"{'kernel':<72} {'target':<7} regs stack  shared matrix  wide narrow programs  loop wgmma waits")
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    compiled: list[tuple[KernelSpec, list[Complaint]]] = []
    complaints: list[Complaint] = []
    for task, report in zip(tasks, _compile(tasks, options.jobs), strict=True):
        spec = task.spec
        if isinstance(report, str):
            complaints.append(Complaint("compile", f"{spec.name} on {task.target}", f"does not compile: {report}"))
            continue
        found = check(report, spec)
        complaints += found
        if task.target == "sm_90":
            compiled.append((spec, found))
        print(_line(report), *(f"[{complaint.kind}]" for complaint in found), flush=True)
        entry = entries.setdefault((task.module, spec.name), _entry(task))
        entry["targets"][task.target] = _fields(report, found)
    if "sm_90" not in one_each_on(options):  # the chosen configurations may lack it
        complaints += not_found(compiled, KNOWN)
    unknown = [complaint for complaint in complaints if complaint.reason is None]
    for complaint in unknown:
        print(complaint, file=sys.stderr)
    found = {
        "triton": version("triton"),
        "kernels": list(entries.values()),
        "complaints": [str(complaint) for complaint in unknown],
        "known": [known_of(complaints, reason) for reason in dict.fromkeys(c.reason for c in complaints if c.reason)],
    }
    if options.json:
        _write(options.json, to_json(found))
    if options.page:
        _write(options.page, page(found))
    return len(unknown)


def _expect_free(name: str, path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got the directory {path}")
    if path.is_file() and path.stat().st_size and not overwrite:
        raise FileExistsError(f"{name}: expected the name of a new file, got {path}, which exists (see --overwrite)")


def _write(path: Path, text: str) -> None:
    """Write a file as a whole: it is written beside its target, synced to disk and renamed. A link stays one."""
    target = Path(os.path.realpath(path))
    whole = not path.exists() or path.is_file()  # /dev/stdout and pipes are written as they are
    written = target.with_name(f".{target.name}-{os.getpid()}.unfinished") if whole else path
    try:
        with written.open("w", encoding="utf-8") as file:
            file.write(text)
            if whole:
                file.flush()
                os.fsync(file.fileno())
        if whole:
            if target.exists():
                shutil.copymode(target, written)
            written.replace(target)
    except OSError as error:
        error.filename = str(path)  # the kernel names none for a full disk
        raise
    finally:
        if whole:
            written.unlink(missing_ok=True)


def known_of(complaints: Sequence[Complaint], reason: str) -> dict[str, Any]:
    """Return the complaints that are known for `reason`, as JSON."""
    of_it = [complaint for complaint in complaints if complaint.reason == reason]
    kinds = sorted({complaint.kind for complaint in of_it})
    return {"reason": reason, "kinds": kinds, "subjects": list(dict.fromkeys(c.subject for c in of_it))}


def _tasks(options: argparse.Namespace, recorded: Sequence[KernelSpec]) -> list[Task]:
    """Return the tasks. A spec that compiles to the same as a launch takes the launch's calls."""
    launches = {spec.compiles_as: spec for spec in recorded}
    few = {spec.name for _, spec in selected_specs(options.modules, only_one_each=True)}
    tasks = []
    for module, spec in selected_specs(options.modules, only_one_each=False):
        if "sm_90" in spec.targets and spec.compiles_as in launches:
            spec = replace(spec, calls=launches.pop(spec.compiles_as).calls)
        skipped = () if spec.name in few else one_each_on(options)
        wanted = (target for target in spec.targets if target in options.targets and target not in skipped)
        tasks += [Task(module, spec, target) for target in wanted]
    if "sm_90" in options.targets:
        tasks += [Task(RECORDED, spec, "sm_90") for spec in launches.values()]
    return tasks


def one_each_on(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the targets that compile one configuration per kernel and type."""
    return () if options.one_each is None else tuple(options.one_each or TARGETS)


def _compile(tasks: list[Task], jobs: int) -> Iterator[Report | str]:
    """Yield the reports in order; a compiler's exception becomes its name and text, so that the others still count."""
    _TASKS[:] = tasks
    if jobs == 1:
        yield from map(_compile_one, range(len(tasks)))
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_compile_one, range(len(tasks)))


def _compile_one(number: int) -> Report | str:
    task = _TASKS[number]
    try:
        return compile_kernel(task.spec, task.target)
    except Exception as error:  # any exception of the compiler is a finding
        return f"{type(error).__name__}: {error}"


def _entry(task: Task) -> dict[str, Any]:
    spec = task.spec
    calls = {"calls": list(spec.calls)} if spec.calls else {}
    return {"module": task.module, "name": spec.name, **configuration(spec), **calls, "targets": {}}


def _fields(report: Report, complaints: list[Complaint]) -> dict[str, Any]:
    """Return a report as JSON, without the fields of sm_90 on other targets."""
    of_the_entry = ("name", "target")
    on_sm_90 = ("warnings", "programs", "limit", "loop", "chained")
    left_out = of_the_entry if report.target == "sm_90" else of_the_entry + on_sm_90
    fields = {name: value for name, value in asdict(report).items() if name not in left_out}
    kinds = [complaint.kind for complaint in complaints]
    return {**fields, "complaints": kinds} if kinds else fields


def _line(report: Report) -> str:
    said = (
        f"{report.name:<72} {report.target:<7} {report.registers:>4} {report.stack_bytes:>5} {report.shared_bytes:>7} "
        f"{report.matrix_instructions:>6} {report.wide_accesses:>5} {report.narrow_accesses:>6}"
    )
    if report.target != "sm_90":
        return said
    loop = report.loop
    said += f" {report.programs:>8} {sum(loop.values()):>5} {loop.get('wgmma', 0):>5} {loop.get('wait', 0):>5}"
    return f"{said} {' '.join(report.warnings)}".rstrip()


def to_json(found: dict[str, Any]) -> str:
    """Return `found` as JSON with one line per kernel, so that a change of one kernel changes one line."""
    kernels = ",\n".join(json.dumps(kernel) for kernel in found["kernels"])
    rest = {name: json.dumps(value) for name, value in found.items()} | {"kernels": f"[\n{kernels}\n]"}
    return "{" + ",\n".join(f'"{name}": {value}' for name, value in rest.items()) + "}\n"
