"""Compile every kernel for GPUs that are not present, and read the compiler's results.

`lion_kernels.aot.gate` checks the results, and `lion_kernels.aot.report` prints them. Compilation finds errors that the
interpreter does not. It needs no GPU either, but a process without `TRITON_INTERPRET`.
"""

import contextlib
import functools
import io
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lion_kernels.aot.occupancy import programs_per_multiprocessor
from lion_kernels.aot.sass import main_loop
from lion_kernels.core.backend import LAUNCH, interpreting
from lion_kernels.core.operator import all_specs
from lion_kernels.core.specs import KernelSpec

# (backend, architecture, threads per warp), by Triton's names.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
RECORDED = "launches"  # the report's section for recorded launches, in place of a module
_MATRIX = {"sm_80": r"\bHMMA", "sm_89": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTC\w*MMA", "gfx942": r"v_mfma"}
# At least 16 bytes per thread or whole tiles, and fewer. (LTC128B is a cache hint, not a width.)
_WIDE = {
    "cuda": r"\b(?:LDG|STG|LDGSTS)(?:\.\w+)*\.(?:128|256)\b|\bUBLKCP|\bUTMA(?:LDG|STG|RED)",
    "hip": r"(?:global|buffer)_(?:load|store)_dwordx4",
}
_NARROW = {
    "cuda": r"\b(?:LDG|STG|LDGSTS)\b(?!(?:\.\w+)*\.(?:128|256)\b)",
    "hip": r"(?:global|buffer)_(?:load|store)_(?!dwordx4)\w",
}


@dataclass(frozen=True)
class Report:
    """The compiler's results for one kernel. Instruction counts are static, not weighted by how often they run.

    Attributes:
        wide_accesses, narrow_accesses: accesses to global memory of at least 16 bytes per thread, and of fewer.
        warnings: codes of ptxas' messages about wgmma, such as "C7515".
        programs, limit: programs per multiprocessor, and the resource that limits them; on sm_90 only.
        loop: instructions of the main loop by class (`lion_kernels.aot.sass`); on sm_90 only.
        chained: wgmma in that loop that accumulate into the previous one's result, and how many of these wait for it.
    """

    name: str
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: int
    wide_accesses: int
    narrow_accesses: int
    warnings: tuple[str, ...] = ()
    programs: int | None = None
    limit: str | None = None
    loop: dict[str, int] = field(default_factory=dict)
    chained: tuple[int, int] = (0, 0)


def compile_kernel(spec: KernelSpec, target: str) -> Report:
    """Compile `spec` for `target`, one of `TARGETS`, and report the results; no GPU is needed.

    Raises:
        ValueError: unknown target.
        RuntimeError: the process interprets its kernels.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if interpreting():
        raise RuntimeError("compile_kernel: kernels are interpreted in this process; run it without TRITON_INTERPRET")
    with _ptxas_messages() as messages:
        compiled = compile_spec(spec, target)
    vendor = TARGETS[target][0]
    code = compiled.asm["amdgcn"] if vendor == "hip" else _disassemble(compiled.asm["cubin"])
    registers, stack_bytes, warnings = read_messages(code if vendor == "hip" else messages.getvalue(), vendor)
    shared_bytes = compiled.metadata.shared
    wide, narrow = count_accesses(code, vendor)
    report = Report(
        name=spec.name,
        target=target,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=shared_bytes,
        matrix_instructions=len(re.findall(_MATRIX[target], code)),
        wide_accesses=wide,
        narrow_accesses=narrow,
        warnings=warnings,
    )
    if target != "sm_90":
        return report
    programs, limit = programs_per_multiprocessor(registers, spec.num_warps, shared_bytes)
    loop = main_loop(code)
    classes, chained = (loop.classes, loop.chained) if loop else ({}, (0, 0))
    return replace(report, programs=programs, limit=limit, loop=classes, chained=chained)


def compile_spec(spec: KernelSpec, target: str) -> Any:
    """Return Triton's compilation of `spec` for `target`, from its cache if present."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(spec.types)
    source = ASTSource(
        fn=spec.kernel,
        signature=spec.types,
        constexprs=spec.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},  # type: ignore[arg-type]
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **LAUNCH}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


@contextlib.contextmanager
def _ptxas_messages() -> Iterator[io.StringIO]:
    """Capture ptxas' messages about kernels compiled within the context, which Triton prints on request.

    A kernel from Triton's cache has no messages.
    """
    from triton import knobs

    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(io.StringIO()) as messages:
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        yield messages


def read_messages(text: str, vendor: str) -> tuple[int, int, tuple[str, ...]]:
    """Return registers per thread, bytes of stack, and the codes C75xx of ptxas' messages about wgmma.

    The text is ptxas' messages ("cuda"), or the assembly with its notes ("hip").

    Raises:
        RuntimeError: the text lacks them.
    """
    if vendor == "hip":
        return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.private_segment_fixed_size:\s*(\d+)", text), ()
    warnings = tuple(sorted(set(re.findall(r"\((C75\d\d)\)", text))))
    return _number(r"Used (\d+) registers", text), _number(r"(\d+) bytes stack frame", text), warnings


def one_each(specs: Iterable[tuple[str, KernelSpec]]) -> Iterator[tuple[str, KernelSpec]]:
    """Yield the first spec per kernel, module, value type and GPU size: enough to test that a compiler accepts them."""
    seen = set()
    for module, spec in specs:
        key = module, spec.kernel, frozenset(spec.signature.values()), spec.compact
        if key not in seen:
            seen.add(key)
            yield module, spec


def selected_specs(modules: list[str] | None, *, only_one_each: bool) -> list[tuple[str, KernelSpec]]:
    """Return the specs of `modules`, or of all if None.

    Raises:
        ValueError: a module has no kernels.
    """
    specs = all_specs()
    unknown = sorted(set(modules or ()) - {module for module, _ in specs})
    if unknown:
        raise ValueError(f"modules: expected some with kernels, got {', '.join(unknown)}")
    specs = [(module, spec) for module, spec in specs if modules is None or module in modules]
    return list(one_each(specs)) if only_one_each else specs


def count_accesses(code: str, vendor: str) -> tuple[int, int]:
    """Count accesses to global memory in "cuda" or "hip" code: at least 16 bytes per thread, and fewer."""
    return len(re.findall(_WIDE[vendor], code)), len(re.findall(_NARROW[vendor], code))


def configuration(spec: KernelSpec) -> dict[str, Any]:
    """Return the values that `spec` fixes, as in the report's JSON."""
    return {"constexprs": spec.constexprs, "num_warps": spec.num_warps, "num_stages": spec.num_stages}


def _disassemble(cubin: bytes) -> str:
    """Return the machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([_cuobjdump(), "--dump-sass", file], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return int(found.group(1))


@functools.cache
def _cuobjdump() -> str:
    """Return the path of the cuobjdump in triton's wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
