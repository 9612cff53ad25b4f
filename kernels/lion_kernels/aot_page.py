"""The ahead-of-time report as a page of tables, from the JSON that `lion_kernels.aot` writes."""

from typing import Any

from lion_kernels.aot import SHARED_LIMITS, TARGETS

_HEAD = """\
# What the compiler makes of the kernels

Made by `lion-fast kernels --json docs/kernels.json --page docs/kernels.md` with Triton {triton}, without a GPU: a time
has not been measured yet. {count} kernels and configurations. Compiled (of these, with spills):
{coverage}. {complaints}.

A cell holds registers a thread, bytes of stack where registers spill, KiB of shared memory, instructions on the matrix
units, and accesses to global memory: of 16 bytes a thread and more, then of fewer. Instructions are counted where they
stand in the code, not as often as they run. Asked for on sm_90 are no stack, at most {limit:.0f} KiB of shared memory,
matrix instructions in every kernel that multiplies tiles of 16-bit values, and accesses of 16 bytes; elsewhere a kernel
has to compile, and its shared memory to fit. GPUs with little of it (sm_89 is GeForce's 40 series, L4 and L40S) get
compact sizes; a cell is empty where a GPU gets the others.
"""


def page(found: dict[str, Any]) -> str:
    """The page in Markdown; `found` as the JSON file holds it: `triton`, `kernels` and `complaints`."""
    kernels = found["kernels"]
    targets = [target for target in TARGETS if any(target in kernel["targets"] for kernel in kernels)]
    complaints = found["complaints"]
    parts = [
        _HEAD.format(
            triton=found["triton"],
            count=len(kernels),
            coverage=", ".join(_coverage(kernels, target) for target in targets),
            complaints="No complaints" if not complaints else f"{len(complaints)} complaints, at the end",
            limit=SHARED_LIMITS["sm_90"] / 1024,
        )
    ]
    for module in dict.fromkeys(kernel["module"] for kernel in kernels):
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


def _cell(report: dict[str, int] | None) -> str:
    if report is None:
        return ""
    said = [f"{report['registers']} registers"]
    if report["stack_bytes"]:
        said.append(f"**{report['stack_bytes']} stack**")
    said.append(f"{report['shared_bytes'] / 1024:.3g} KiB")
    if report["matrix_instructions"]:
        said.append(f"{report['matrix_instructions']} matrix")
    return ", ".join([*said, f"{report['wide_accesses']} + {report['narrow_accesses']}"])
