"""The modules that all operators share: the choice of a backend and of tile sizes, and the arithmetic of costs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lion_kernels
from lion_kernels.core import backend, tuned_sizes
from lion_kernels.core.cost import H200, Cost, Device, floor_seconds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "device", "interprets", "chosen"),
    [
        ("auto", CPU, False, "torch"),
        ("auto", CPU, True, "torch"),  # the interpreter is for tests and must be requested
        ("auto", CUDA, False, "triton"),
        ("triton", CPU, True, "triton"),
        ("triton", CUDA, False, "triton"),
        ("torch", CUDA, False, "torch"),
    ],
)
def test_resolve_backend(
    asked: str, device: torch.device, interprets: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_INTERPRETING", interprets)
    assert backend.resolve_backend(asked, "op", device) == chosen


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETING", False)
    with pytest.raises(ValueError, match=r"backend: op runs 'triton' on a CUDA device, .* got cpu"):
        backend.resolve_backend("triton", "op", CPU)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert backend.resolve_backend("auto", "op", CUDA) == "torch"
    with pytest.raises(ValueError, match="backend: op has no 'triton' here, triton cannot be imported"):
        backend.resolve_backend("triton", "op", CUDA)


def test_imports_without_triton() -> None:
    """Without triton, as on macOS and Windows, the operators run in PyTorch."""
    code = """
import sys
sys.modules["triton"] = None
import torch, lion_kernels
from lion_kernels import mixture_of_adapters
x = torch.ones(2, 4)
out = mixture_of_adapters(x, torch.ones(1, 3, 4), None, torch.ones(1, 4, 3), None, torch.ones(1))
assert out.tolist() == [[12.0] * 4] * 2, out
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(lion_kernels.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_tf32_is_used_only_where_torch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETING", False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert backend.dot_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert backend.dot_precision(torch.float32) == "tf32"
        assert backend.dot_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one table of tile sizes, for the current GPU."""
    table = {"op": {"many": {"BM": 256}, "few": {"num_warps": 2}}}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(table), encoding="utf-8")
    monkeypatch.setattr(tuned_sizes, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned_sizes, "_gpu", lambda: "NVIDIA H200")
    tuned_sizes._table.cache_clear()
    yield tmp_path
    tuned_sizes._table.cache_clear()


def test_a_table_takes_the_default_s_place(tables: Path) -> None:
    default = {"BM": 64, "num_warps": 4}
    assert tuned_sizes.lookup("op", "many", default) == {"BM": 256, "num_warps": 4}
    assert tuned_sizes.lookup("op", "unknown class", default) == default
    assert tuned_sizes.lookup("another", "many", default) == default
    assert tuned_sizes.shipped("op") == [{"BM": 256}, {"num_warps": 2}]
    assert tuned_sizes.shipped("another") == []


@pytest.mark.parametrize("gpu", [None, "NVIDIA H300", "../nvidia_h200"])
def test_an_unknown_gpu_gets_the_default(gpu: str | None, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tables / "sub").mkdir()
    monkeypatch.setattr(tuned_sizes, "FOLDER", tables / "sub")
    monkeypatch.setattr(tuned_sizes, "_gpu", lambda: gpu)
    assert tuned_sizes.lookup("op", "many", {"BM": 64}) == {"BM": 64}


def test_costs_add_up() -> None:
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    device = Device("d", bytes_per_second=10.0, flops_per_second={"float16": 100.0})
    assert floor_seconds(Cost(20, 50), device, torch.float16) == 2.0
    assert floor_seconds(Cost(20, 500), device, torch.float16) == 5.0
    with pytest.raises(ValueError, match=r"dtype: expected one measured on NVIDIA H200 \(bfloat16, float16\), got"):
        floor_seconds(Cost(1, 1), H200, torch.float32)
