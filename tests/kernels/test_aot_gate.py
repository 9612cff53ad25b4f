"""The gate's complaints and its known ones; the gate detects a kernel that ptxas serialises."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lion_kernels.aot import gate as aot_gate
from lion_kernels.aot.compile import KernelSpec, all_specs
from lion_kernels.aot.gate import KINDS, KNOWN, Known, check, not_found
from tests.kernels.uninterpreted import GOOD, SPEC, run_uninterpreted

KERNEL: Any = SimpleNamespace(__name__="k", arg_names=())


def spec_of(**constants: Any) -> KernelSpec:
    return replace(SPEC, kernel=KERNEL, constexprs=constants)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stack_bytes": 64}, "k on sm_90: 64 bytes of stack: registers spill [spill]"),
        ({"shared_bytes": 240000}, "k on sm_90: 240000 bytes of shared memory, at most 232448 fit [shared]"),
        ({"matrix_instructions": 0}, "k on sm_90: no matrix instruction (HGMMA) [matrix]"),
        ({"wide_accesses": 0}, "k on sm_90: no 16-byte access to global memory [wide]"),
        ({"warnings": ("C7515", "C7519")}, "k on sm_90: ptxas says C7515: it serialises wgmma [ptxas]"),
        ({"warnings": ("C7510",)}, "k on sm_90: ptxas says C7510: it serialises wgmma [ptxas]"),
        ({"chained": (6, 6)}, "k on sm_90: each of the main loop's 8 wgmma is waited for, with 2 waits [waits]"),
        (
            {"loop": {"wgmma": 8, "wait": 2, "load": 4}},
            "k on sm_90: the main loop's 8 wgmma wait for what they read: it copies nothing ahead [ahead]",
        ),
        (
            {"target": "sm_80", "shared_bytes": 170000},
            "k on sm_80: 170000 bytes of shared memory, at most 166912 fit [shared]",
        ),
    ],
)
def test_what_is_wrong_is_said(change: dict, complaint: str) -> None:
    spec = spec_of()
    assert check(GOOD, spec) == []
    (said,) = check(replace(GOOD, **change), spec)
    assert str(said) == complaint
    assert said.kind in KINDS
    assert said.reason is None


@pytest.mark.parametrize(
    "change",
    [
        {"warnings": ("C7519",)},
        {"chained": (6, 1)},
        {"chained": (0, 0), "loop": {"wgmma": 1, "wait": 1, "copy ahead": 2}},
        {"loop": {"mma": 8, "load": 4}},
        {"loop": {}},
    ],
)
def test_what_is_fine_is_not(change: dict) -> None:
    """An inserted arrive, a wait between two products, a product of one step, and kernels without wgmma are fine."""
    assert check(replace(GOOD, **change), spec_of()) == []


def test_elsewhere_it_is_enough_to_compile() -> None:
    report = replace(GOOD, target="gfx942", shared_bytes=65536, stack_bytes=64, matrix_instructions=0, wide_accesses=0)
    assert check(report, spec_of()) == []


def test_what_is_known_has_its_reason_and_what_is_not_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known("spill", "k", {"BM": 64, "num_warps": 4}, "Nobody mended it.")
    monkeypatch.setattr(aot_gate, "KNOWN", (known,))
    spilt = replace(GOOD, stack_bytes=8, wide_accesses=0)
    assert [(c.kind, c.reason) for c in check(spilt, spec_of(BM=64))] == [("spill", known.reason), ("wide", None)]
    for other in (spec_of(BM=128), spec_of(), replace(spec_of(BM=64), num_warps=8)):
        assert [c.reason for c in check(spilt, other)] == [None, None]


def test_what_one_version_gives_rise_to_is_known_of_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known("spill", "k", {}, "Nobody mended it.", triton="3.9")
    monkeypatch.setattr(aot_gate, "KNOWN", (known,))
    spilt = replace(GOOD, stack_bytes=8)
    for version, reason in (("3.9.0", known.reason), ("3.9.1", known.reason), ("3.6.0", None), ("3.90.0", None)):
        monkeypatch.setattr(aot_gate, "version", lambda _, version=version: version)
        assert [complaint.reason for complaint in check(spilt, spec_of())] == [reason]
        assert bool(not_found([(spec_of(), [])], [known])) == (reason is not None)


def test_what_is_listed_and_does_not_occur_is_a_complaint() -> None:
    known = Known("spill", "k", {"BM": 64}, "Nobody mended it.")
    spilt, spec = replace(GOOD, stack_bytes=8), spec_of(BM=64)
    assert not_found([(spec, check(spilt, spec)), (spec, check(GOOD, spec))], [known]) == []
    assert not_found([(spec_of(BM=32), [])], [known]) == []  # no such configuration was compiled
    (said,) = not_found([(spec, check(GOOD, spec)), (spec, [])], [known])
    assert str(said).startswith("k {'BM': 64} on sm_90: none of 2 has the known complaint 'spill'")


@pytest.mark.parametrize("known", KNOWN, ids=[f"{known.kernel} {known.kind}" for known in KNOWN])
def test_the_list_names_kernels_that_there_are(known: Known) -> None:
    assert known.kind in KINDS
    assert known.reason.endswith(".")
    kernels = {spec.kernel_name: spec.kernel for _, spec in all_specs()}
    arguments = {*kernels[known.kernel].arg_names, "num_warps", "num_stages", "float32"}
    assert known.constants.keys() <= arguments


@pytest.mark.slow
def test_a_narrow_product_after_the_loop_does_not_pass() -> None:
    """The same product before the loop passes: the gate detects how the order of steps affects the machine code."""
    run = run_uninterpreted(Path(__file__).with_name("serialised.py"))
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"last": ["ptxas", "waits"], "first": []}
