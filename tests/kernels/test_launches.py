"""The kernel launches of `lion-fast check` and of the model, as `lion_fast.check.launches` records them from Triton."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_fast.check.launches import PRODUCT_ROWS, recording
from lion_fast.check.uncomputed import Uncomputed
from lion_kernels.aot.compile import all_specs
from lion_kernels.aot.report import RECORDED
from lion_kernels.core.backend import interpreting
from tests.kernels.uninterpreted import run_uninterpreted

pytestmark = pytest.mark.slow
DOCS = Path(__file__).resolve().parents[2] / "docs"
Launches = list[dict[str, Any]]


@pytest.fixture(scope="module")
def launches() -> Launches:
    run = run_uninterpreted(Path(__file__).with_name("launches.py"))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_is_launched(launches: Launches) -> None:
    assert {launch["kernel"] for launch in launches} == {spec.kernel_name for _, spec in all_specs()}
    names = [launch["name"] for launch in launches]
    assert len(set(names)) == len(names)


def test_the_model_launches_what_it_should(launches: Launches) -> None:
    """At both sizes, training launches forward and backward kernels, and generation only forward kernels."""
    by_call: dict[str, set[str]] = {}
    for launch in launches:
        for call in launch["calls"]:
            by_call.setdefault(call, set()).add(launch["kernel"])
    for size in ("XL", "XXL"):
        training, generation = by_call[f"{size}: training, stage 4"], by_call[f"{size}: generation, 8 with 5 beams"]
        assert training >= {
            "attention_forward",
            "attention_backward_queries",
            "attention_backward_keys",
            "hidden_kernel",
            "update_kernel",
            "hidden_gradient_kernel",
            "outer_kernel",
            "up_gradient_kernel",
            "rms_norm_backward_kernel",
            "residual_layer_norm_backward_kernel",
            "gated_gelu_backward_kernel",
            "assemble_inputs_forward_kernel",
        }
        assert "_bias_gradient" not in training  # the language model is frozen
        assert generation >= {"attention_forward", "hidden_kernel", "update_kernel", "rms_norm_forward_kernel"}
        assert not any("backward" in kernel or "gradient" in kernel for kernel in generation)


def test_types_are_those_that_are_compiled(launches: Launches) -> None:
    """The specs for compilation contain every argument type that is launched."""
    compiled: dict[str, dict[str, set[str]]] = {}
    for _, spec in all_specs():
        types = compiled.setdefault(spec.kernel_name, {name: set() for name in spec.kernel.arg_names})
        for name, kind in spec.types.items():
            types[name].add(kind)
    for launch in launches:
        for name, kind in launch["types"].items():
            known = compiled[launch["kernel"]][name]
            # An integer that is 1 is a constant, and a stride compiled with 64 bits may need only 32.
            accepted = known | {"constexpr"} | ({"i32"} if "i64" in known else set())
            assert kind in accepted, f"{launch['name']}: {name} is launched as {kind}, compiled as {accepted}"


def test_the_documented_launches_are_these(launches: Launches) -> None:
    """If a launch has changed, regenerate the page with the command that it names."""
    found = json.loads((DOCS / "kernels.json").read_text(encoding="utf-8"))
    calls = sorted(kernel["calls"] for kernel in found["kernels"] if "calls" in kernel)
    assert calls == sorted(launch["calls"] for launch in launches)
    recorded = {kernel["name"] for kernel in found["kernels"] if kernel["module"] == RECORDED}
    assert recorded <= {launch["name"] for launch in launches}


def test_kernels_with_products_are_known_by_their_rows() -> None:
    for _, spec in all_specs():
        if spec.matrix:
            assert spec.kernel_name in PRODUCT_ROWS
        if spec.kernel_name in PRODUCT_ROWS:
            assert PRODUCT_ROWS[spec.kernel_name] in spec.constexprs


@pytest.mark.skipif(not interpreting(), reason="kernels are compiled in this process")
def test_an_interpreted_kernel_has_no_launches() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"), recording():
        pass


def test_large_values_are_not_computed_and_small_ones_are() -> None:
    def loss_of(weight: Tensor, x: Tensor) -> Tensor:
        return (x @ weight.t()).relu().mean()

    with Uncomputed():
        weight = torch.randn(2000, 1000, requires_grad=True)
        loss = loss_of(weight, torch.randn(3, 1000))
        loss.backward()
        small = loss_of(torch.ones(2, 3), torch.ones(4, 3))
        masked = torch.arange(6).view(2, 3)[:, 1:] > 2
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape
    assert weight.grad.stride() == weight.stride()
    assert loss.shape == ()
    assert small.item() == 3.0
    assert masked.tolist() == [[False, False], [True, True]]
