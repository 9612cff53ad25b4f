"""The digest of the kernels covers everything that determines the machine code, and nothing else."""

import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lion_kernels.aot import digest as module
from lion_kernels.aot.compile import KernelSpec
from lion_kernels.aot.digest import digest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SOURCE = '''
from typing import Any, NamedTuple

import triton
import triton.language as tl

FACTOR = tl.constexpr(2)


class Pair(NamedTuple):
    first: Any
    second: Any


@triton.jit
def double(x):
    """Twice x."""
    return FACTOR * x  # exact


@triton.jit
def kernel(p_x, n, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    pair = Pair(double(tl.load(p_x + o_x, mask=o_x < n)), o_x)
    tl.store(p_x + pair.second, pair.first)


def launch(x):
    kernel[(1,)](x, x.numel(), BLOCK=16)
'''
Make = Callable[..., KernelSpec]


@pytest.fixture
def make_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A function that returns the spec of SOURCE's kernel, with parts of the source replaced."""
    numbers = itertools.count()

    def make(*replacements: tuple[str, str]) -> KernelSpec:
        source = SOURCE
        for old, new in replacements:
            assert old in source
            source = source.replace(old, new)
        file = tmp_path / f"kernels_{next(numbers)}.py"
        file.write_text(source, encoding="utf-8")
        found = importlib.util.spec_from_file_location(file.stem, file)
        assert found is not None
        assert found.loader is not None
        loaded = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, file.stem, loaded)  # where `inspect` looks for a class's source
        found.loader.exec_module(loaded)
        types = {"p_x": "*fp32", "n": "i32"}
        return KernelSpec("k", loaded.kernel, types, {"BLOCK": 16}, num_warps=4, num_stages=3, matrix=False)

    return make


@pytest.mark.parametrize(
    "change",
    [
        ('    """Twice x."""\n', ""),
        ("# exact", "# another word"),
        ("import triton\n", "import os\n\n# moved\nimport triton\n"),
        ("FACTOR * x", "(FACTOR  *  x)"),
        ("x.numel()", "16"),
    ],
)
def test_what_the_compiler_never_sees_does_not_count(make_spec: Make, change: tuple[str, str]) -> None:
    assert digest([make_spec(change)]) == digest([make_spec()])


@pytest.mark.parametrize(
    "change",
    [
        ("FACTOR * x", "x * FACTOR"),
        ("constexpr(2)", "constexpr(3)"),
        ("mask=o_x < n", "mask=o_x <= n"),
        ("second: Any", "second: int"),
        ("@triton.jit\ndef double", "@triton.jit(noinline=True)\ndef double"),
    ],
)
def test_a_kernel_and_what_it_calls_count(make_spec: Make, change: tuple[str, str]) -> None:
    assert digest([make_spec(change)]) != digest([make_spec()])


def test_what_a_launch_fixes_counts(make_spec: Make) -> None:
    spec = make_spec()
    changes = [
        {"constexprs": {"BLOCK": 32}},
        {"signature": {"p_x": "*bf16", "n": "i32"}},
        {"divisible": ("n",)},
        {"unaligned": ("p_x",)},
        {"num_warps": 8},
        {"num_stages": 2},
        {"matrix": True},
        {"wide_access": False},
        {"compact": True},
    ]
    digests = [digest([spec]), *(digest([replace(spec, **change)]) for change in changes)]
    assert len(set(digests)) == len(digests)


def test_names_order_and_repetition_do_not_count(make_spec: Make) -> None:
    spec = make_spec()
    other = replace(spec, num_warps=8)
    renamed = replace(spec, name="another", calls=("check",))
    assert digest([spec, other]) == digest([other, renamed, spec]) != digest([spec])


def test_how_kernels_are_compiled_and_judged_counts(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    before = digest([spec])
    monkeypatch.setattr(module, "JUDGES", module.JUDGES[1:])
    without_one = digest([spec])
    monkeypatch.setattr(module, "LAUNCH", {**module.LAUNCH, "another": True})
    assert len({before, without_one, digest([spec])}) == 3


def test_a_global_that_cannot_be_compared_is_named(make_spec: Make) -> None:
    spec = make_spec(("FACTOR = tl.constexpr(2)", "FACTOR = [2]"))
    with pytest.raises(TypeError, match=r"double: expected FACTOR to be a constant, got \[2\]"):
        digest([spec])


def test_the_record_is_of_the_documented_report_s_triton() -> None:
    recorded = (DOCS / "kernels.digest").read_text(encoding="utf-8")
    triton = json.loads((DOCS / "kernels.json").read_text(encoding="utf-8"))["triton"]
    assert re.fullmatch(rf"[0-9a-f]{{64}}, compiled with triton {re.escape(triton)} and [0-9.]+\n", recorded)
