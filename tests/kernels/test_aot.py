"""Every kernel compiles for GPUs that are not here, and for Hopper as it should."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lion_kernels.aot import (
    TARGETS,
    KernelSpec,
    Report,
    all_specs,
    check,
    compile_kernel,
    configuration,
    count_accesses,
    one_each,
    selected_specs,
    to_json,
)
from lion_kernels.aot_page import page
from lion_kernels.backend import interpreting

SPEC = KernelSpec("k", None, {}, {}, num_warps=4, num_stages=3, matrix=True)
GOOD = Report(
    "k",
    "sm_90",
    registers=120,
    stack_bytes=0,
    shared_bytes=98304,
    matrix_instructions=4,
    wide_accesses=8,
    narrow_accesses=2,
)
DOCS = Path(__file__).resolve().parents[2] / "docs"


def run_uninterpreted(*command: str | Path) -> subprocess.CompletedProcess:
    """Python in a process of its own, because this one may interpret its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles_ahead_of_time(target: str, tmp_path: Path) -> None:
    """One configuration of each kernel for each maker's GPUs; all of them, for all targets, are CI's own step."""
    found = tmp_path / "report.json"
    run = run_uninterpreted("-m", "lion_kernels", "--one-each", "--targets", target, "--json", found)
    assert found.is_file(), run.stderr
    report = json.loads(found.read_text(encoding="utf-8"))
    assert not report["complaints"], "\n".join(report["complaints"])
    launched = [spec.name for _, spec in one_each(all_specs()) if target in spec.targets]
    assert [kernel["name"] for kernel in report["kernels"]] == launched
    assert all(list(kernel["targets"]) == [target] for kernel in report["kernels"])


def test_what_is_compiled_is_what_is_launched() -> None:
    """The types of every argument of every kernel, as Triton itself tells them of real calls of the operators."""
    run = run_uninterpreted(Path(__file__).with_name("launches.py"))
    assert run.returncode == 0, run.stderr
    launched = json.loads(run.stdout)
    compiled: dict[str, dict[str, set[str]]] = {}
    for _, spec in all_specs():
        types = compiled.setdefault(spec.kernel.fn.__name__, {name: set() for name in spec.kernel.arg_names})
        for name, kinds in types.items():
            kinds.add("constexpr" if name in spec.constexprs else spec.signature[name])
    assert launched.keys() == compiled.keys()
    for kernel, arguments in launched.items():
        for name, kinds in arguments.items():
            # An integer that is 1 is a constant, and a stride may need 64 bits.
            accepted = compiled[kernel][name] | {"constexpr"} | ({"i32"} if "i64" in compiled[kernel][name] else set())
            assert set(kinds) <= accepted, f"{kernel}: {name} is launched as {kinds}, compiled as {accepted}"


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
    report = replace(GOOD, target="gfx942", shared_bytes=65536, stack_bytes=64, matrix_instructions=0, wide_accesses=0)
    assert check(report, SPEC) == []


def test_a_gpu_is_compiled_for_what_it_is_launched_with() -> None:
    assert SPEC.targets == list(TARGETS)
    assert replace(SPEC, compact=True).targets == ["sm_89", "gfx942"]
    assert replace(SPEC, compact=False).targets == ["sm_80", "sm_90", "sm_100"]


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        compile_kernel(SPEC, "sm_70")


@pytest.mark.parametrize(
    ("line", "vendor", "wide", "narrow"),
    [
        ("LDG.E.128.CONSTANT R4, [R2] ;", "cuda", 1, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2] ;", "cuda", 1, 0),
        ("LDG.E.LTC128B.64 R4, [R2] ;", "cuda", 0, 1),
        ("STG.E.U16 desc[UR4][R2.64], R5 ;", "cuda", 0, 1),
        ("UTMALDG.2D [UR8], [UR4] ;", "cuda", 1, 0),
        ("LDS.128 R4, [R2] ;", "cuda", 0, 0),
        ("global_load_dwordx4 v[0:3], v4, s[0:1]", "hip", 1, 0),
        ("buffer_store_short v0, v1, s[0:3], 0 offen", "hip", 0, 1),
    ],
)
def test_accesses_are_told_by_width(line: str, vendor: str, wide: int, narrow: int) -> None:
    assert (count_accesses(line, vendor)) == (wide, narrow)


def test_one_each_has_every_kernel() -> None:
    every, few = list(all_specs()), list(one_each(all_specs()))
    assert {(module, spec.kernel) for module, spec in few} == {(module, spec.kernel) for module, spec in every}
    assert len(few) < len(every) / 2


def test_the_documented_report_is_of_these_kernels() -> None:
    """Make it anew with the command that the page names wherever a kernel's configuration has changed."""
    found = json.loads((DOCS / "kernels.json").read_text(encoding="utf-8"))
    documented = [{name: value for name, value in kernel.items() if name != "targets"} for kernel in found["kernels"]]
    current = [{"module": module, "name": spec.name, **configuration(spec)} for module, spec in all_specs()]
    assert documented == json.loads(json.dumps(current))
    assert [list(kernel["targets"]) for kernel in found["kernels"]] == [spec.targets for _, spec in all_specs()]
    assert not found["complaints"]


def test_the_documented_page_is_the_report() -> None:
    found = json.loads((DOCS / "kernels.json").read_text(encoding="utf-8"))
    assert (DOCS / "kernels.md").read_text(encoding="utf-8") == page(found)


def test_the_page_says_what_is_wrong() -> None:
    report = {name: value for name, value in asdict(GOOD).items() if name not in ("name", "target")}
    kernel = {"module": "m", "name": "m k", "num_warps": 4, "num_stages": 3}
    spilt = {**kernel, "targets": {"sm_90": {**report, "stack_bytes": 64}}}
    text = page({"triton": "3.9.0", "kernels": [spilt], "complaints": ["k on sm_90: registers spill"]})
    assert "| k | 4, 3 | 120 registers, **64 stack**, 96 KiB, 4 matrix, 8 + 2 |" in text
    assert "- k on sm_90: registers spill" in text


def test_a_line_of_the_json_is_a_kernel() -> None:
    found = {"triton": "3.9.0", "kernels": [{"name": "a"}, {"name": "b"}], "complaints": []}
    text = to_json(found)
    assert json.loads(text) == found
    assert {'{"name": "a"},', '{"name": "b"}'} <= set(text.splitlines())


def test_unknown_module() -> None:
    with pytest.raises(ValueError, match="modules: expected some with kernels, got attention"):
        selected_specs(["attention"], only_one_each=False)


@pytest.mark.skipif(not interpreting(), reason="kernels are compiled in this process")
def test_an_interpreted_kernel_is_not_compiled() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_kernel(SPEC, "sm_90")
