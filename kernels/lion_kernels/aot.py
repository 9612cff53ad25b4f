"""Compile every kernel for GPUs that are not here, and check what the compiler made of it.

    python -m lion_kernels

prints, for every kernel and shipped configuration of every module with `kernel_specs()`, its registers, stack, shared
memory, matrix instructions and the widths of its accesses to global memory on each target, and fails on what `check`
finds. The interpreter accepts code that the compiler does not; this needs no GPU either, but a process without
`TRITON_INTERPRET`.
"""

import argparse
import functools
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lion_kernels.backend import LAUNCH, interpreting
from lion_kernels.configs import COMPACT_BELOW

# (backend, architecture, threads of a warp) as Triton names them.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have. A target with little of it is launched with compact sizes.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
_MATRIX = {"sm_80": r"\bHMMA", "sm_89": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTC\w*MMA", "gfx942": r"v_mfma"}
# 16 bytes a thread and more, or whole tiles; and fewer. (A cache hint, LTC128B, is no width.)
_WIDE = {
    "cuda": r"\b(?:LDG|STG|LDGSTS)(?:\.\w+)*\.(?:128|256)\b|\bUBLKCP|\bUTMA(?:LDG|STG|RED)",
    "hip": r"(?:global|buffer)_(?:load|store)_dwordx4",
}
_NARROW = {
    "cuda": r"\b(?:LDG|STG|LDGSTS)\b(?!(?:\.\w+)*\.(?:128|256)\b)",
    "hip": r"(?:global|buffer)_(?:load|store)_(?!dwordx4)\w",
}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with one configuration, as it is launched.

    Attributes:
        name: names kernel and configuration in the report.
        kernel: the `@triton.jit` function.
        signature: argument name -> "*bf16", "i32", "i64", "fp32"; "constexpr" may be left out.
        constexprs: the values of the constexpr arguments (and of integers that are 1, which a launch specialises on).
        num_warps, num_stages: as launched.
        matrix: whether it has to use the matrix units.
        wide_access: whether it has to read or write 16 bytes at once.
        divisible: names of integer arguments that are multiples of 16. Pointers always are.
        compact: whether it is launched where `is_compact`, or elsewhere; on every GPU where None.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool
    wide_access: bool = True
    divisible: tuple[str, ...] = ()
    compact: bool | None = None

    @property
    def targets(self) -> list[str]:
        """Those on which it is launched."""
        limits = SHARED_LIMITS.items()
        return [target for target, limit in limits if self.compact in (None, limit < COMPACT_BELOW)]


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel. Instructions are counted where they stand, not as often as they run.

    `wide_accesses` to global memory move 16 bytes a thread or more, `narrow_accesses` fewer.
    """

    name: str
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: int
    wide_accesses: int
    narrow_accesses: int


def compile_kernel(spec: KernelSpec, target: str) -> Report:
    """Compiles `spec` for `target`, one of `TARGETS`; no GPU is needed.

    Raises:
        ValueError: unknown target.
        RuntimeError: in a process that interprets its kernels.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if interpreting():
        raise RuntimeError("compile_kernel: kernels are interpreted in this process; run it without TRITON_INTERPRET")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = spec.kernel.arg_names
    signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in arguments}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in spec.divisible]
    source = ASTSource(
        fn=spec.kernel,
        signature=signature,
        constexprs=spec.constexprs,
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned},  # type: ignore[arg-type]
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **LAUNCH}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    registers, stack_bytes, code = _disassemble(compiled.asm, target)
    wide, narrow = count_accesses(code, TARGETS[target][0])
    return Report(
        name=spec.name,
        target=target,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=len(re.findall(_MATRIX[target], code)),
        wide_accesses=wide,
        narrow_accesses=narrow,
    )


def check(report: Report, spec: KernelSpec) -> list[str]:
    """What is wrong with `report`, a sentence each.

    Shared memory has to fit on every target. Spills, matrix units and wide accesses are asked for on sm_90, the
    target that the configurations are made for; elsewhere it is enough to compile.
    """
    complaints = []
    limit = SHARED_LIMITS[report.target]
    if report.shared_bytes > limit:
        complaints.append(f"{report.shared_bytes} bytes of shared memory, at most {limit} fit")
    if report.target == "sm_90":
        if report.stack_bytes:
            complaints.append(f"{report.stack_bytes} bytes of stack: registers spill")
        if spec.matrix and not report.matrix_instructions:
            complaints.append("no matrix instruction (HGMMA)")
        if spec.wide_access and not report.wide_accesses:
            complaints.append("no 16-byte access to global memory")
    return [f"{report.name} on {report.target}: {complaint}" for complaint in complaints]


def all_specs() -> Iterator[tuple[str, KernelSpec]]:
    """(module name, spec) of every kernel of every module of lion_kernels that has `kernel_specs()`."""
    package = importlib.import_module("lion_kernels")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"lion_kernels.{info.name}")
        for spec in getattr(module, "kernel_specs", list)():
            yield info.name, spec


def one_each(specs: Iterable[tuple[str, KernelSpec]]) -> Iterator[tuple[str, KernelSpec]]:
    """The first spec of each kernel, module, type of values and size of GPU: enough to see what a compiler takes."""
    seen = set()
    for module, spec in specs:
        key = module, spec.kernel, frozenset(spec.signature.values()), spec.compact
        if key not in seen:
            seen.add(key)
            yield module, spec


def selected_specs(modules: list[str] | None, *, only_one_each: bool) -> list[tuple[str, KernelSpec]]:
    """The specs of `modules`, all where None.

    Raises:
        ValueError: a module has no kernels.
    """
    specs = list(all_specs())
    unknown = sorted(set(modules or ()) - {module for module, _ in specs})
    if unknown:
        raise ValueError(f"modules: expected some with kernels, got {', '.join(unknown)}")
    specs = [(module, spec) for module, spec in specs if modules is None or module in modules]
    return list(one_each(specs)) if only_one_each else specs


def count_accesses(code: str, vendor: str) -> tuple[int, int]:
    """Accesses to global memory in machine code ("cuda" or "hip"): of 16 bytes a thread and more, and of fewer."""
    return len(re.findall(_WIDE[vendor], code)), len(re.findall(_NARROW[vendor], code))


def configuration(spec: KernelSpec) -> dict[str, Any]:
    """What `spec` fixes, as JSON holds it."""
    return {"constexprs": spec.constexprs, "num_warps": spec.num_warps, "num_stages": spec.num_stages}


def _disassemble(asm: Any, target: str) -> tuple[int, int, str]:
    """Registers, bytes of stack and the machine code as text."""
    if TARGETS[target][0] == "hip":
        code = asm["amdgcn"]
        return _number(r"\.vgpr_count:\s*(\d+)", code), _number(r"\.private_segment_fixed_size:\s*(\d+)", code), code
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(asm["cubin"])
        usage = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file], check=True, capture_output=True, text=True
        )
        code = subprocess.run([_cuobjdump(), "--dump-sass", file], check=True, capture_output=True, text=True)
    return _number(r"REG:(\d+)", usage.stdout), _number(r"STACK:(\d+)", usage.stdout), code.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return int(found.group(1))


@functools.cache
def _cuobjdump() -> str:
    """The one that triton's wheel brings."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def to_json(found: dict[str, Any]) -> str:
    """`found` with a line for each kernel, so that a change of one is a change of one line."""
    kernels = ",\n".join(json.dumps(kernel) for kernel in found["kernels"])
    rest = {name: json.dumps(value) for name, value in found.items()} | {"kernels": f"[\n{kernels}\n]"}
    return "{" + ",\n".join(f'"{name}": {value}' for name, value in rest.items()) + "}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What chooses the report's part."""
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="modules to compile (default: all)")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--one-each", action="store_true", help="one configuration of each kernel and type only")
    parser.add_argument("--json", type=Path, metavar="F", help="write configurations, reports and complaints here too")
    parser.add_argument("--page", type=Path, metavar="F", help="write the report as a page of Markdown")


def main(arguments: list[str] | None = None) -> int:
    """`python -m lion_kernels`: prints the report; returns the number of complaints."""
    parser = argparse.ArgumentParser(prog="python -m lion_kernels", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    return print_report(parser.parse_args(arguments))


def print_report(options: argparse.Namespace) -> int:
    """Compiles what `options` (of `add_arguments`) name, and prints the report; returns the number of complaints.

    Raises:
        ValueError: no kernel is in one of the modules.
        RuntimeError: in a process that interprets its kernels.
    """
    if interpreting():
        raise RuntimeError("kernels are interpreted in this process; run it without TRITON_INTERPRET")
    specs = selected_specs(options.modules, only_one_each=options.one_each)
    entries, complaints = [], []
    print(f"triton {version('triton')}")
    print(f"{'kernel':<72} {'target':<7} regs stack  shared matrix  wide narrow")
    for module, spec in specs:
        reports = {}
        targets = [target for target in spec.targets if target in options.targets]
        if not targets:
            continue
        for target in targets:
            try:
                report = compile_kernel(spec, target)
            except Exception as error:  # whatever the compiler raises is one more finding, and the others still count
                complaints.append(f"{spec.name} on {target}: does not compile: {type(error).__name__}: {error}")
                continue
            print(
                f"{spec.name:<72} {target:<7} {report.registers:>4} {report.stack_bytes:>5} {report.shared_bytes:>7} "
                f"{report.matrix_instructions:>6} {report.wide_accesses:>5} {report.narrow_accesses:>6}",
                flush=True,
            )
            reports[target] = {name: value for name, value in asdict(report).items() if name not in ("name", "target")}
            complaints += check(report, spec)
        entries.append({"module": module, "name": spec.name, **configuration(spec), "targets": reports})
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    found = {"triton": version("triton"), "kernels": entries, "complaints": complaints}
    if options.json:
        options.json.write_text(to_json(found), encoding="utf-8")
    if options.page:
        from lion_kernels.aot_page import page

        options.page.write_text(page(found), encoding="utf-8")
    return len(complaints)
