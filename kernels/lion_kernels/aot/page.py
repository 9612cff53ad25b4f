"""The ahead-of-time report as a page of tables, from the JSON that `lion_kernels.aot.report` writes."""

from collections.abc import Iterable
from typing import Any

from lion_kernels.aot.compile import SHARED_LIMITS, TARGETS
from lion_kernels.aot.gate import KINDS
from lion_kernels.aot.report import RECORDED

_HEAD = """\
# What the compiler makes of the kernels

Made by `lion-fast kernels --one-each sm_80 sm_100 --json docs/kernels.json --page docs/kernels.md` with Triton
{triton}, without a GPU: a time has not been measured yet. {count} kernels and configurations. Compiled (of these, with
spills): {coverage}. {complaints}.

First come the launches that are made on sm_90, then what the kernels list themselves for every GPU. How long these
launches take to compile is in [compile_times.json](compile_times.json), which
`python -m lion_fast.check.compile_times` made with Triton 3.6.0.
"""

_LAUNCHES = """\
## Launches on sm_90

Recorded from `lion-fast check` and from the whole model at the sizes of LION-FlanT5-XL and -XXL: training in every
stage (16 x 417 tokens), evaluation, and generation of 1 and 8 with 1 and 5 beams. A kernel's name has its types and
constants. Programs are those that share a multiprocessor, and in brackets what allows no more. The main loop is the
inner loop with the most matrix instructions, or the longest: its instructions for a tile, of these wgmma and waits for
wgmma, and the commonest other classes. Complaints are

{kinds}

and those in brackets are known: the next section has the reasons. Launches of the model, and of what `check` times:
"""

_TABLE = (
    "| kernel | launched by | registers | programs | main loop | wgmma, waits | of these | complaints |",
    "|---|---|---|---|---|---|---|---|",
)

_WRITTEN = """\
## Every GPU

A cell holds registers a thread, bytes of stack where registers spill, KiB of shared memory, instructions on the matrix
units, and accesses to global memory: of 16 bytes a thread and more, then of fewer. Instructions are counted where they
stand in the code, not as often as they run. Asked for on sm_90 are no stack, at most {limit:.0f} KiB of shared memory,
matrix instructions in every kernel that multiplies tiles of 16-bit values, accesses of 16 bytes, and none of the other
complaints above; elsewhere a kernel has to compile, and its shared memory to fit. GPUs with little of it (sm_89 is
GeForce's 40 series, L4 and L40S) get compact sizes; a cell is empty where a GPU gets the others. On sm_80 and sm_100
one configuration of each kernel and type is compiled.
"""


def page(found: dict[str, Any]) -> str:
    """The page in Markdown; `found` as the JSON file holds it: `triton`, `kernels`, `complaints` and `known`."""
    kernels = found["kernels"]
    complaints, known = found["complaints"], found["known"]
    targets = [target for target in TARGETS if any(target in kernel["targets"] for kernel in kernels)]
    said = "No complaints" if not complaints else f"{len(complaints)} complaints, at the end"
    said += f", {sum(len(one['subjects']) for one in known)} kernels with known ones" if known else ""
    limit = SHARED_LIMITS["sm_90"] / 1024
    parts = [
        _HEAD.format(
            triton=found["triton"],
            count=len(kernels),
            coverage=", ".join(_coverage(kernels, target) for target in targets),
            complaints=said,
        )
    ]
    launched = [kernel for kernel in kernels if "calls" in kernel and "sm_90" in kernel["targets"]]
    if launched:
        kinds = "\n".join(
            f"- {kind}: {meaning};" for kind, meaning in KINDS.items() if kind not in ("compile", "known")
        )
        small = [kernel for kernel in launched if all(call.startswith("check:") for call in kernel["calls"])]
        parts += [_LAUNCHES.format(kinds=kinds), *_TABLE]
        parts += [_launch(kernel, known) for kernel in launched if kernel not in small]
        parts += ["", "Launches of `check`'s small cases alone, in bfloat16 and float32:\n", *_TABLE]
        parts += [*(_launch(kernel, known) for kernel in small), ""]
    if known:
        parts.append("## Known\n")
        for number, one in enumerate(known, 1):
            parts.append(f"{number}. {', '.join(one['kinds'])}: {one['reason']} In {len(one['subjects'])} kernels.")
        parts.append("")
    parts.append(_WRITTEN.format(limit=limit))
    for module in dict.fromkeys(kernel["module"] for kernel in kernels if kernel["module"] != RECORDED):
        parts.append(f"## {module}\n")
        parts.append("| kernel | warps, stages | " + " | ".join(targets) + " |")
        parts.append("|---|---|" + "---|" * len(targets))
        for kernel in (kernel for kernel in kernels if kernel["module"] == module):
            cells = [_cell(kernel["targets"].get(target)) for target in targets]
            name = kernel["name"].removeprefix(f"{module} ").removeprefix(f"{module}.")
            parts.append(f"| {name} | {kernel['num_warps']}, {kernel['num_stages']} | {' | '.join(cells)} |")
        parts.append("")
    if complaints:
        parts += ["## Complaints\n", *(f"- {complaint}" for complaint in complaints), ""]
    return "\n".join(parts)


def _coverage(kernels: list[dict[str, Any]], target: str) -> str:
    reports = [kernel["targets"][target] for kernel in kernels if target in kernel["targets"]]
    spilling = sum(report["stack_bytes"] > 0 for report in reports)
    return f"{target} {len(reports)} ({spilling})"


def _launch(kernel: dict[str, Any], known: list[dict[str, Any]]) -> str:
    """A row of the table of launches."""
    report = kernel["targets"]["sm_90"]
    loop, calls = report["loop"], kernel["calls"]
    registers = str(report["registers"]) + (f", **{report['stack_bytes']} stack**" if report["stack_bytes"] else "")
    others = sorted(((n, name) for name, n in loop.items() if name not in ("wgmma", "wait")), reverse=True)
    classes = ", ".join(f"{n} {name}" for n, name in others[:4])
    wgmma = f"{loop['wgmma']}, {loop.get('wait', 0)}" if "wgmma" in loop else ""
    by = next((call for call in calls if not call.startswith("check")), calls[0])  # the model's before a check's
    by += f" and {len(calls) - 1} more" if len(calls) > 1 else ""
    complaints = ", ".join(_complaint(kernel["name"], kind, known) for kind in report.get("complaints", ()))
    cells = (kernel["name"], by, registers, f"{report['programs']} ({report['limit']})", sum(loop.values()) or "none")
    return "| " + " | ".join(map(str, (*cells, wgmma, classes, complaints))) + " |"


def _complaint(name: str, kind: str, known: Iterable[dict[str, Any]]) -> str:
    """`kind`, in brackets with the reason's number where it is known of the kernel of that name."""
    for number, one in enumerate(known, 1):
        if kind in one["kinds"] and f"{name} on sm_90" in one["subjects"]:
            return f"({kind}, {number})"
    return f"**{kind}**"


def _cell(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    said = [f"{report['registers']} registers"]
    if report["stack_bytes"]:
        said.append(f"**{report['stack_bytes']} stack**")
    said.append(f"{report['shared_bytes'] / 1024:.3g} KiB")
    if report["matrix_instructions"]:
        said.append(f"{report['matrix_instructions']} matrix")
    return ", ".join([*said, f"{report['wide_accesses']} + {report['narrow_accesses']}"])
