"""Complaints about a compiled kernel, and the list of known ones.

Shared memory must fit on every target. The other checks apply to sm_90, the target of the configurations; elsewhere,
kernels only need to compile. `KNOWN` lists complaints that are not fixed yet, with the reason; they stay in the report
and on its page. An entry that no longer occurs is itself a complaint, so that fixes shrink the list.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

from lion_kernels.aot.compile import Report
from lion_kernels.core.specs import SHARED_LIMITS, KernelSpec

# Kind of complaint -> its description on the page.
KINDS = {
    "compile": "the compiler refuses it",
    "shared": "more shared memory than a program may have",
    "spill": "registers spill to the stack",
    "matrix": "no matrix instruction in a kernel that multiplies tiles of 16-bit values",
    "wide": "no 16-byte access to global memory",
    "ptxas": "ptxas warns (C75xx) that it serialises wgmma in the whole kernel",
    "waits": "the main loop waits for every wgmma before it issues the next",
    "ahead": "the main loop multiplies with wgmma but prefetches nothing",
    "known": "listed as known but does not occur",
}


@dataclass(frozen=True)
class Complaint:
    """One of `KINDS`, about the kernel and target named `subject`; `reason` comes from `KNOWN` if it is known."""

    kind: str
    subject: str
    text: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {self.text} [{self.kind}]"


class Known(NamedTuple):
    """A complaint of `kind` about `kernel` on sm_90 in all configurations with these `constants`.

    The constants include `num_warps`, `num_stages`, and `float32`: whether no pointer is to half precision. `triton` is
    the only version that causes it, such as "3.9", or None for all.
    """

    kind: str
    kernel: str
    constants: dict[str, Any]
    reason: str
    triton: str | None = None

    def is_of(self, spec: KernelSpec) -> bool:
        if spec.kernel_name != self.kernel or self.triton not in (None, _minor(version("triton"))):
            return False
        float32 = {"*bf16", "*fp16"}.isdisjoint(spec.types.values())
        launch = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "float32": float32}
        fixed = {**spec.constexprs, **launch}
        return all(name in fixed and fixed[name] == value for name, value in self.constants.items())


def _minor(full: str) -> str:
    """Return the minor version: "3.9.0" -> "3.9"."""
    return ".".join(full.split(".")[:2])


_WITHOUT_MATRIX_UNITS = (
    "Float32 is multiplied without matrix units, and wide heads with a bias or three tasks fill the registers."
)
_EIGHT_BYTES = "8 bytes a thread are kept on the stack, which the main loop touches once at most."

KNOWN: tuple[Known, ...] = (
    Known(
        "ahead",
        "update_kernel",
        {"CHANNEL": True, "CHOOSE": True, "BM": 128},
        "The gate's product sits in a branch for each task, before which nothing is copied ahead. Folding the gate "
        "into the up weights once a call makes it one plain product.",
    ),
    Known(
        "waits",
        "update_kernel",
        {"CHANNEL": False, "E": 4, "RANK": 8, "BM": 128},
        "A product of rank 8 for each expert is one step, waited for before the next expert's. For many rows with a "
        "gate per row, two products of the library's with the gate on the hidden between them are near the floor.",
    ),
    Known(
        "ahead",
        "_bias_gradient",
        {"num_stages": 1, "BLOCK": 64},
        "A tile of scores in registers beside the sum of a diagonal leaves none for a second stage. LION's language "
        "model is frozen, and its table gets no gradient.",
    ),
    Known(
        "spill",
        "attention_forward",
        {"HEAD_DIM": 64, "CAUSAL": True, "BM": 16, "num_warps": 8, "p_lse": None},
        _EIGHT_BYTES,
        "3.9",
    ),
    Known("spill", "attention_forward", {"HEAD_DIM": 128, "float32": True}, _WITHOUT_MATRIX_UNITS),
    Known("spill", "attention_backward_queries", {"HEAD_DIM": 128, "float32": True}, _WITHOUT_MATRIX_UNITS),
    Known("spill", "_bias_gradient", {"HEAD_DIM": 88, "float32": True}, _WITHOUT_MATRIX_UNITS, "3.6"),
    Known("spill", "update_kernel", {"TASKS": 3, "RANK": 64, "float32": True}, _WITHOUT_MATRIX_UNITS, "3.6"),
    Known("spill", "hidden_kernel", {"BF": 64, "SPLIT": True, "float32": True}, _WITHOUT_MATRIX_UNITS, "3.6"),
    Known("spill", "residual_layer_norm_backward_kernel", {"D": 176, "float32": True}, _EIGHT_BYTES, "3.6"),
    Known("spill", "gated_gelu_backward_kernel", {"BT": 64, "BD": 16}, _EIGHT_BYTES, "3.9"),
    Known(
        "spill",
        "residual_layer_norm_backward_kernel",
        {"D": 1408, "p_x_bias": None, "p_dresidual": None},
        _EIGHT_BYTES,
        "3.9",
    ),
)
# ptxas' messages C75xx without serialisation; this one reports an inserted arrive.
HARMLESS = frozenset({"C7519"})


def check(report: Report, spec: KernelSpec) -> list[Complaint]:
    """Return the complaints about `report`, including the known ones."""
    found: dict[str, str] = {}
    limit = SHARED_LIMITS[report.target]
    if report.shared_bytes > limit:
        found["shared"] = f"{report.shared_bytes} bytes of shared memory, at most {limit} fit"
    if report.target == "sm_90":
        wgmma, waits = report.loop.get("wgmma", 0), report.loop.get("wait", 0)
        chained, waited = report.chained
        if report.stack_bytes:
            found["spill"] = f"{report.stack_bytes} bytes of stack: registers spill"
        if spec.matrix and not report.matrix_instructions:
            found["matrix"] = "no matrix instruction (HGMMA)"
        if spec.wide_access and not report.wide_accesses:
            found["wide"] = "no 16-byte access to global memory"
        if serialised := [code for code in report.warnings if code not in HARMLESS]:
            found["ptxas"] = f"ptxas says {', '.join(serialised)}: it serialises wgmma"
        if waited and waited == chained:
            found["waits"] = f"each of the main loop's {wgmma} wgmma is waited for, with {waits} waits"
        if wgmma and not report.loop.get("copy ahead"):
            found["ahead"] = f"the main loop's {wgmma} wgmma wait for what they read: it copies nothing ahead"
    subject = f"{report.name} on {report.target}"
    return [Complaint(kind, subject, text, _reason(kind, spec, report.target)) for kind, text in found.items()]


def _reason(kind: str, spec: KernelSpec, target: str) -> str | None:
    listed = (known.reason for known in KNOWN if target == "sm_90" and known.kind == kind and known.is_of(spec))
    return next(listed, None)


def not_found(compiled: Iterable[tuple[KernelSpec, list[Complaint]]], known: Iterable[Known]) -> list[Complaint]:
    """Return a complaint for each of `known` that applies to `compiled` on sm_90 and occurs in none of its kernels."""
    missing = []
    compiled = list(compiled)
    for one in known:
        of_it = [{complaint.kind for complaint in complaints} for spec, complaints in compiled if one.is_of(spec)]
        if of_it and not any(one.kind in kinds for kinds in of_it):
            subject = f"{one.kernel} {one.constants} on sm_90"
            text = f"none of {len(of_it)} has the known complaint {one.kind!r}; take it off the list"
            missing.append(Complaint("known", subject, text))
    return missing
