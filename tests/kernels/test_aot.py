"""Every kernel compiles for GPUs that are not here, and for Hopper as it should."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lion_kernels
from lion_kernels.aot import TARGETS, KernelSpec, Report, check, compile_kernel
from lion_kernels.backend import interpreting

# A hundred kernels that take minutes for each target: `python -m lion_kernels --modules multi_scale_attention` does it.
ATTENTION = {"multi_scale_attention", "relative_bias_attention"}
MODULES = [
    info.name
    for info in pkgutil.iter_modules(lion_kernels.__path__)
    if info.name not in ATTENTION and hasattr(importlib.import_module(f"lion_kernels.{info.name}"), "kernel_specs")
]
SPEC = KernelSpec("k", None, {}, {}, num_warps=4, num_stages=3, matrix=True)
GOOD = Report("k", "sm_90", registers=120, stack_bytes=0, shared_bytes=98304, matrix_instructions=4, wide_accesses=8)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_ahead_of_time(module: str, target: str, tmp_path: Path) -> None:
    """In a process of its own, because this one may interpret its kernels. Prints the report on failure, or with -s."""
    found = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(lion_kernels.__file__).parents[1])
    command = [sys.executable, "-m", "lion_kernels", "--modules", module, "--targets", target, "--json", str(found)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout)
    assert found.is_file(), run.stderr
    report = json.loads(found.read_text(encoding="utf-8"))
    assert not report["complaints"], "\n".join(report["complaints"])
    assert report["reports"]
    assert {entry["module"] for entry in report["reports"]} == {module}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stack_bytes": 64}, "k on sm_90: 64 bytes of stack: registers spill"),
        ({"shared_bytes": 240000}, "k on sm_90: 240000 bytes of shared memory, at most 232448 fit"),
        ({"matrix_instructions": 0}, "k on sm_90: no matrix instruction"),
        ({"wide_accesses": 0}, "k on sm_90: no 16-byte access to global memory"),
        ({"target": "sm_80", "shared_bytes": 170000}, "k on sm_80: 170000 bytes of shared memory, at most 166912 fit"),
    ],
)
def test_what_is_wrong_is_said(change: dict, complaint: str) -> None:
    assert check(GOOD, SPEC) == []
    (said,) = check(replace(GOOD, **change), SPEC)
    assert complaint in said


def test_elsewhere_it_is_enough_to_compile() -> None:
    assert check(replace(GOOD, target="gfx942", stack_bytes=64, matrix_instructions=0, wide_accesses=0), SPEC) == []


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        compile_kernel(SPEC, "sm_70")


@pytest.mark.skipif(not interpreting(), reason="kernels are compiled in this process")
def test_an_interpreted_kernel_is_not_compiled() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_kernel(SPEC, "sm_90")
