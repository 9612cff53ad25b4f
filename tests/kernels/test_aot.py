"""The ahead-of-time report: kernels compile for GPUs that are not present, and the documented report is current."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lion_kernels.aot.compile import (
    TARGETS,
    all_specs,
    compile_kernel,
    configuration,
    count_accesses,
    one_each,
    read_messages,
    selected_specs,
)
from lion_kernels.aot.page import page
from lion_kernels.aot.report import RECORDED, to_json
from lion_kernels.core.backend import interpreting
from tests.kernels.uninterpreted import GOOD, SPEC, run_uninterpreted

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LION_SLOW_TESTS"), reason="minutes, and in .ci/kernels: set LION_SLOW_TESTS")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles_ahead_of_time(target: str, tmp_path: Path) -> None:
    """Compile one configuration of each kernel for a GPU of each vendor; `.ci/kernels` covers all targets."""
    found = tmp_path / "report.json"
    run = run_uninterpreted("-m", "lion_kernels", "--one-each", "--targets", target, "--json", found)
    assert found.is_file(), run.stderr
    report = json.loads(found.read_text(encoding="utf-8"))
    assert not report["complaints"], "\n".join(report["complaints"])
    launched = [spec.name for _, spec in one_each(all_specs()) if target in spec.targets]
    assert [kernel["name"] for kernel in report["kernels"]] == launched
    assert all(list(kernel["targets"]) == [target] for kernel in report["kernels"])


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
    """If a kernel's configuration has changed, regenerate the report with the command on its page."""
    found = json.loads((DOCS / "kernels.json").read_text(encoding="utf-8"))
    listed = [kernel for kernel in found["kernels"] if kernel["module"] != RECORDED]
    documented = [{name: kernel[name] for name in kernel if name not in ("targets", "calls")} for kernel in listed]
    current = [{"module": module, "name": spec.name, **configuration(spec)} for module, spec in all_specs()]
    assert documented == json.loads(json.dumps(current))
    few = {spec.name for _, spec in one_each(all_specs())}
    for kernel, (_, spec) in zip(listed, all_specs(), strict=True):
        left_out = () if spec.name in few else ("sm_80", "sm_100")
        assert list(kernel["targets"]) == [target for target in spec.targets if target not in left_out]
    assert not found["complaints"]


def test_the_documented_page_is_the_report() -> None:
    found = json.loads((DOCS / "kernels.json").read_text(encoding="utf-8"))
    assert (DOCS / "kernels.md").read_text(encoding="utf-8") == page(found)


def test_the_page_says_what_is_wrong() -> None:
    report = {name: value for name, value in asdict(GOOD).items() if name not in ("name", "target")}
    kernel = {"module": "m", "name": "m k", "num_warps": 4, "num_stages": 3}
    spilt = {**kernel, "targets": {"sm_90": {**report, "stack_bytes": 64}}}
    found = {"triton": "3.9.0", "kernels": [spilt], "complaints": ["k on sm_90: registers spill"], "known": []}
    text = page(found)
    assert "| k | 4, 3 | 120 registers, **64 stack**, 96 KiB, 4 matrix, 8 + 2 |" in text
    assert "- k on sm_90: registers spill" in text
    assert "Launches" not in text


def test_the_page_has_a_row_for_each_launch() -> None:
    """A known complaint is in brackets with the number of its reason, any other in bold."""
    report = {name: value for name, value in asdict(GOOD).items() if name not in ("name", "target")}
    kernel = {"module": RECORDED, "name": "k BM=64", "num_warps": 4, "num_stages": 3}
    calls = ["check: rms_norm, 1 x 64", "XL: training, stage 1"]
    launch = {**kernel, "calls": calls, "targets": {"sm_90": {**report, "complaints": ["ahead", "ptxas"]}}}
    known = {"reason": "Nobody mended it.", "kinds": ["ahead"], "subjects": ["k BM=64 on sm_90"]}
    text = page({"triton": "3.9.0", "kernels": [launch], "complaints": [], "known": [known]})
    by = "XL: training, stage 1 and 1 more"
    row = f"| k BM=64 | {by} | 120 | 4 (registers) | 90 | 8, 2 | 70 float, 10 copy ahead | (ahead, 1), **ptxas** |"
    assert row in text
    assert "1. ahead: Nobody mended it. In 1 kernels." in text
    assert f"## {RECORDED}" not in text


PTXAS = """\
ptxas-blackwell info    : 11 bytes gmem
ptxas-blackwell info    : (C7519) warpgroup.arrive is injected in around line 878 by compiler to allow use of registers
ptxas-blackwell info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to something else
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas-blackwell info    : Used 64 registers, used 1 barriers
"""


def test_ptxas_is_read() -> None:
    assert read_messages(PTXAS, "cuda") == (64, 8, ("C7515", "C7519"))
    amd = ".private_segment_fixed_size: 0\n.vgpr_count: 98"
    assert read_messages(amd, "hip") == (98, 0, ())
    with pytest.raises(RuntimeError, match="no 'Used"):
        read_messages("", "cuda")


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
