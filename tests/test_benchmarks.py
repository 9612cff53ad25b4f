"""The benchmarks' own promises: no time for a wrong result, and a script that leaves what it found."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.side_by_side import DEVICE, Inputs, leaf, measure
from lion_kernels.cost import Cost

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"


class Clock:
    """Stands for pytest-benchmark's fixture, and counts what it is given."""

    def __init__(self) -> None:
        self.extra_info: dict[str, float] = {}
        self.group = ""
        self.timed = 0

    def __call__(self, function: Callable[..., None], *args: object) -> None:
        function(*args)
        self.timed += 1


def right(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def wrong_output(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight * 1.01


def wrong_gradient(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.detach() + (weight - weight.detach())


def unwritten(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight + torch.where(torch.arange(8, device=DEVICE) == 3, float("nan"), 0.0)


@pytest.fixture
def inputs() -> Inputs:
    return {"x": leaf(torch.randn(5, 8)), "weight": leaf(torch.randn(8))}


def run(clock: Clock, operator: Callable[..., Tensor], inputs: Inputs, backward: bool = True) -> None:
    costs = Cost(4_300_000, 0), Cost(8_600_000, 0)
    measure(clock, operator, inputs, plain=right, reference=right, costs=costs, backward=backward, title="product")


@pytest.mark.parametrize(("backward", "floor"), [(False, 1.0), (True, 3.0)])
def test_what_is_right_is_timed(backward: bool, floor: float, inputs: Inputs) -> None:
    clock = Clock()
    run(clock, right, inputs, backward)
    assert clock.timed == 1
    assert clock.extra_info == {"floor of an H200 in bf16, us": floor}
    assert clock.group.startswith(f"product, {'forward+backward' if backward else 'forward'}, ")


@pytest.mark.parametrize(
    ("operator", "tensor"), [(wrong_output, "out"), (wrong_gradient, "weight"), (unwritten, "out")]
)
def test_what_is_wrong_is_not(operator: Callable[..., Tensor], tensor: str, inputs: Inputs) -> None:
    clock = Clock()
    with pytest.raises(AssertionError, match=rf"wrong {tensor} \(relative error .*\), so no time"):
        run(clock, operator, inputs)
    assert clock.timed == 0


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.slow
def test_the_gpu_script_leaves_what_it_found(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT), str(tmp_path / "out"), "environment"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "environment    passed" in run.stdout.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "environment.json").read_text(encoding="utf-8"))["torch"] == torch.__version__
    assert run.stdout.splitlines()[-1] in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    command[-1] = "enviroment"
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "no part enviroment\n")
