"""`lion-fast kernels`, also from a process with interpreted kernels."""

import json
import os
import sys
from pathlib import Path

import pytest

from lion_fast.cli import main


@pytest.mark.slow
def test_kernels_are_compiled_and_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found, page = tmp_path / "kernels.json", tmp_path / "kernels.md"
    options = ["--modules", "gated_gelu", "--targets", "sm_90", "gfx942", "--one-each", "--jobs", "2"]
    assert main(["kernels", *options, "--json", str(found), "--page", str(page)]) == 0
    kernels = json.loads(found.read_text(encoding="utf-8"))["kernels"]
    assert {kernel["module"] for kernel in kernels} == {"gated_gelu"}
    assert all(list(kernel["targets"]) == ["sm_90", "gfx942"] for kernel in kernels)
    assert "| kernel | warps, stages | sm_90 | gfx942 |" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_module_without_kernels_is_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert main(["kernels", "--modules", "gates"]) == 2
    assert "modules: expected some with kernels, got gates" in capfd.readouterr().err


def test_an_unknown_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["kernels", "--targets", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err
