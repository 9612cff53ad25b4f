"""The cases on which every operator's common contract is tested, and the ways to compute them.

A case (`lion_fast.check.cases`) has tensors by name, the call in lion_kernels and the call in lion_reference.
`test_contract.py` tests the contract. What only one operator promises is tested in the file of its name.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lion_kernels
from lion_fast.check import cases
from lion_fast.check.cases import Case, Tensors
from lion_fast.check.compare import Draw, counted_launches, leaves, make_tensors
from lion_kernels.core.backend import interpreting
from tests.interpreter import large_tiles
from tests.rounding import OPERATOR_FP32, relative_error

LOW_RANK = ("mixture_of_adapters", "mixture_of_lora_linear")
ATTENTION = ("multi_scale_attention", "relative_bias_attention")
KEEPS_DTYPES = ("residual_layer_norm", "rms_norm", "gated_gelu", "assemble_inputs")  # also under autocast
CPU = torch.device("cpu")
gradient_of = Draw(CPU)

# Ways to compute: "triton", the kernels; "torch", PyTorch; "formula", the custom ops on a CPU without the interpreter;
# "fused", mixture_of_lora_linear in one kernel, where "triton" adds the update to the library's product.


def changed(case: Case, label: str, change: Callable[[Tensors], Tensors], **options: Any) -> Case:
    """Return `case` with changed tensors and options."""
    return replace(
        case,
        label=f"{case.label}, {label}",
        make=lambda generator: change(case.make(generator)),
        options=case.options | options,
    )


# The cases of `lion-fast check`, and more: features that those leave out, and sizes at the tiles' edges.
CASES = (
    *cases.CASES,
    cases.adapters("sparse", (2, 40), 40, 3, 8),  # many rows and few experts: no expert is skipped
    cases.adapters("sparse", (1, 40), 264, 4, 16),  # few rows: without gradients they are split over channels
    cases.adapters("sparse", (2, 9), 48, 16, 24),
    cases.adapters("channel by row", (2, 9), 264, 2, 64, tasks=6),  # gate rows are gathered, not selected
    cases.adapters("dense", (1, 40), 264, 4, 16),
    cases.lora("channel by row", (2, 9), 48, 40, 2, 8, tasks=7),
    cases.maps_attention(1, (1,), 8, heads=1),
    cases.maps_attention(129, (65,), 88, batch=1, heads=1, dropout=True),
    cases.maps_attention(33, (17, 1, 70), 40, scale=0.2),
    cases.maps_attention(17, (17, 40), 72, gate=True, dropout=True),
    cases.maps_attention(70, (17, 1, 70), 16, heads=1, mask=True, gate=True),
    cases.maps_attention(20, (33,), 128, heads=1, mask=True, dropout=True),
    cases.biased_attention(2, 2, 8),
    cases.biased_attention(50, 193, 16, batch=1, heads=1, max_distance=20),
    cases.biased_attention(70, 70, 40, heads=1, mask=True, buckets=10, max_distance=9),
    cases.biased_attention(70, 100, 88, heads=1, mask=True, decoder=True, max_distance=30),
    cases.biased_attention(33, 33, 16, decoder=True, bidirectional=True, buckets=16, max_distance=12, dropout=True),
    cases.biased_attention(17, 257, 80, batch=1, heads=1, decoder=True),
    cases.layer_norm((5,), 101, x_bias=False, dropout=True),
    cases.layer_norm((257,), 64, dropout=True),
    cases.rms_norm((5,), 100),
    cases.rms_norm((2,), 8192),
    cases.rms_norm((3,), 4),
    cases.gated_gelu((5,), 1025),
    cases.gated_gelu((7,), 1),
    cases.gated_gelu((), 33),
    cases.assemble(2, 0, 65, 48, 50),
)

# Small cases of each form of each operator, for tests that do not depend on sizes.
SMALL = (
    cases.adapters("channel", (3, 5), 32, 2, 8),
    cases.adapters("dense", (3, 5), 32, 2, 8),
    cases.adapters("sparse", (3, 5), 32, 2, 8),
    cases.lora("channel", (3, 5), 32, 40, 2, 8),
    cases.lora("dense", (3, 5), 32, 40, 2, 8),
    cases.lora("sparse", (3, 5), 32, 40, 2, 8),
    cases.maps_attention(17, (33,), 24, heads=1),
    cases.maps_attention(9, (20, 7), 16, heads=1, mask=True, gate=True, dropout=True),
    cases.biased_attention(17, 17, 16, heads=1),
    cases.biased_attention(9, 33, 16, heads=1, mask=True, decoder=True, dropout=True),
    cases.layer_norm((2, 3), 48, x_bias=False),
    cases.layer_norm((2, 3), 48, dropout=True),
    cases.rms_norm((3, 5), 48),
    cases.gated_gelu((3, 5), 48),
    cases.assemble(2, 3, 5, 48, 9),
)
OPTIONAL = {"mixture_of_adapters": ("down_bias", "up_bias", "residual"), "mixture_of_lora_linear": ("bias",)}
# The small cases without an optional argument, and with one that is rarely given.
VARIANTS = (
    *(
        changed(case, f"no {absent}", lambda given, absent=absent: _without(given, absent), **{absent: None})
        for case in SMALL
        for absent in OPTIONAL.get(case.operator, ())
    ),
    *(
        changed(case, "an input of the update's own", lambda given: given | {"update_input": given["x"].flip(0)})
        for case in SMALL
        if case.operator == "mixture_of_lora_linear"
    ),
)


def _without(given: Tensors, absent: str) -> Tensors:
    return {name: value for name, value in given.items() if name != absent}


def name_of(case: Case) -> str:
    return f"{case.operator}: {case.label}"


def by_case(of: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", of, ids=name_of)


def by_case_and_way(of: tuple[Case, ...], *ways: str) -> pytest.MarkDecorator:
    """Parametrise a test over the cases `of`, each with those of `ways` that its operator has."""
    pairs = [(case, way) for case in of for way in ways if way != "fused" or case.operator == "mixture_of_lora_linear"]
    named = [pytest.param(case, way, id=f"{name_of(case)}-{way}") for case, way in pairs]
    return pytest.mark.parametrize(("case", "way"), named)


@contextmanager
def computing(way: str, *, own_tiles: bool = False) -> Iterator[str]:
    """Yield a `backend` that computes in this way; check that it launches kernels, or none.

    In the interpreter, attention uses the tiles for 16-bit values, which are up to ten times as fast, unless it must
    use its dtype's `own_tiles`.
    """
    if way == "formula" and not interpreting():
        pytest.skip("the custom ops are compiled kernels here")
    lora = importlib.import_module("lion_kernels.mixture_of_lora_linear")
    with pytest.MonkeyPatch.context() as patch, large_tiles() if interpreting() and not own_tiles else nullcontext():
        if way == "formula":
            patch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
        patch.setattr(lora, "fuses", lambda *_: way == "fused")
        with counted_launches() as launches:
            yield "torch" if way == "torch" else "triton"
    assert bool(launches) == (way in ("triton", "fused")), f"{way}: launched {dict(launches)}"


def operator_of(case: Case) -> Callable[..., Tensor]:
    return getattr(lion_kernels, case.operator)


def make(case: Case, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensors:
    """Return the case's tensors; floating ones require gradients."""
    return leaves(make_tensors(case, dtype, device))


def results(
    operator: Callable[..., Tensor],
    tensors: Tensors,
    arguments: dict[str, Any],
    grad: Tensor | None = None,
    **rest: Any,
) -> Tensors:
    """Return `out` and, by name, the gradients of `tensors` that require one; `arguments` are made from `tensors`."""
    out = operator(**arguments, **rest)
    if not out.requires_grad:
        return {"out": out}
    wanted = [name for name, value in tensors.items() if value.requires_grad]
    gradients = torch.autograd.grad(out, [tensors[name] for name in wanted], gradient_of(out) if grad is None else grad)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def run(case: Case, tensors: Tensors, backend: str, grad: Tensor | None = None, **changes: Any) -> Tensors:
    """Return the operator's results; `changes` replace its arguments."""
    return results(operator_of(case), tensors, case.arguments(tensors) | changes, grad, backend=backend)


def reference(
    case: Case, tensors: Tensors, dtype: torch.dtype = torch.float64, device: torch.device = CPU, grad: Any = None
) -> Tensors:
    """Return the reference's results, computed in `dtype` from the values of `tensors`."""
    wide = leaves(tensors, dtype, device)
    return results(lambda: case.reference(wide), wide, {}, None if grad is None else grad.detach().to(device, dtype))


def expect_close(got: Tensors, expected: Tensors, bound: float = OPERATOR_FP32) -> None:
    """Assert that each tensor's relative error is below `bound`, or its absolute error where zero is expected."""
    for name, value in got.items():
        if expected[name].numel() == 0 or expected[name].abs().max() < 1e-12:
            assert value.shape == expected[name].shape
            assert (value.abs() < bound).all(), name
        else:
            assert relative_error(value, expected[name]) < bound, name


def expect_equal(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


class Recorder(TorchDispatchMode):
    """Records the calls of lion_kernels' custom ops, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "lion_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(case: Case, tensors: Tensors, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the custom ops that forward and backward call, with their arguments."""
    with Recorder() as recorder:
        run(case, tensors, backend)
    return recorder.calls
