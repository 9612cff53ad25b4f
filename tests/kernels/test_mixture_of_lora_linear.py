"""`lion_kernels.mixture_of_lora_linear` against the fp64 reference: outputs, gradients, both ways to y, errors."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lion_kernels import mixture_of_lora_linear
from lion_reference import mixture_of_lora_linear as reference
from tests.kernels.gradients import Inputs, Measure, cast, outputs_and_gradients
from tests.rounding import OPERATOR_FP16, OPERATOR_FP32, rounding_bound

MODULE = importlib.import_module("lion_kernels.mixture_of_lora_linear")  # the function has the module's name
GATES = ("channel", "channel_by_row", "dense", "dense_shared", "sparse")
WAYS = ("torch", "fused", "library")


def make_inputs(
    gate: str, experts: int, rank: int, widths: tuple[int, int], shape: tuple[int, ...] = (3, 5), tasks: int = 4
) -> Inputs:
    """fp64 inputs of one gate form, every floating tensor asking for its gradient."""
    generator = torch.Generator().manual_seed(0)
    width_in, width_out = widths

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    inputs: Inputs = {
        "x": randn(*shape, width_in),
        "weight": randn(width_out, width_in),
        "bias": randn(width_out),
        "lora_a": randn(experts, rank, width_in),
        "lora_b": randn(experts, width_out, rank),
    }
    if gate.startswith("channel"):
        ids = torch.randint(0, tasks, shape if gate == "channel_by_row" else shape[:1], generator=generator)
        return {**inputs, "gate": randn(tasks, experts, width_out), "task_ids": ids}
    if gate == "sparse":
        ids = torch.randint(-1, experts, (*shape, 2), generator=generator)
        return {**inputs, "gate": randn(*ids.shape), "expert_ids": ids}
    return {**inputs, "gate": randn(*(shape if gate == "dense" else ()), experts)}


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., Tensor]]:
    """The operator by one of `WAYS`."""

    def by(way: str) -> Callable[..., Tensor]:
        monkeypatch.setattr(MODULE, "fuses", lambda *_: way == "fused")
        backend = "torch" if way == "torch" else "triton"
        return lambda **given: mixture_of_lora_linear(**given, backend=backend)

    return by


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("experts", "rank", "widths", "shape"),
    [(1, 4, (64, 40), (3, 5)), (3, 16, (72, 136), (2, 17)), (8, 64, (176, 64), (1, 1))],
)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_the_reference(
    way: str,
    gate: str,
    experts: int,
    rank: int,
    widths: tuple[int, int],
    shape: tuple[int, ...],
    operator: Callable[[str], Callable[..., Tensor]],
    device: torch.device,
    relative_error: Measure,
) -> None:
    inputs = make_inputs(gate, experts, rank, widths, shape)
    expected = outputs_and_gradients(reference, inputs, scaling=0.5)
    got = outputs_and_gradients(operator(way), cast(inputs, torch.float32, device), scaling=0.5)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name
    with torch.no_grad():
        out = operator(way)(**cast(inputs, torch.float32, device), scaling=0.5)
    assert relative_error(out, expected["out"]) < OPERATOR_FP32


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("way", "gate", "experts", "rank", "widths", "shape"),
    [
        ("fused", "channel", 2, 64, (1408, 176), (1, 17)),
        ("library", "channel_by_row", 2, 8, (176, 2048), (3,)),
        ("fused", "dense", 3, 4, (4096, 64), (1,)),
        ("library", "sparse", 16, 16, (64, 64), (417,)),
    ],
)
def test_sizes_of_models(
    way: str,
    gate: str,
    experts: int,
    rank: int,
    widths: tuple[int, int],
    shape: tuple[int, ...],
    operator: Callable[[str], Callable[..., Tensor]],
    device: torch.device,
    relative_error: Measure,
) -> None:
    inputs = make_inputs(gate, experts, rank, widths, shape)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(operator(way), cast(inputs, torch.float32, device)).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", ["torch", "library"])
def test_updates_may_read_an_input_of_their_own(
    way: str,
    gate: str,
    operator: Callable[[str], Callable[..., Tensor]],
    device: torch.device,
    relative_error: Measure,
) -> None:
    inputs = make_inputs(gate, 3, 4, (40, 72), (2, 9))
    dropped = torch.nn.functional.dropout(inputs["x"].detach(), 0.5)
    inputs["update_input"] = dropped.requires_grad_()
    expected = outputs_and_gradients(reference, inputs, scaling=0.5)
    got = outputs_and_gradients(operator(way), cast(inputs, torch.float32, device), scaling=0.5)
    assert "update_input" in got
    if gate.startswith("dense"):  # ids are looked at, which fake tensors do not take
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert operator(way)(**cast(inputs, torch.float32, device)).shape == expected["out"].shape
    for name, value in got.items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("way", WAYS[1:])
def test_many_tasks(
    way: str, operator: Callable[[str], Callable[..., Tensor]], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs("channel_by_row", 2, 8, (48, 40), (2, 9), tasks=7)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(operator(way), cast(inputs, torch.float32, device)).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_no_worse_than_the_plain_formula(
    way: str,
    gate: str,
    operator: Callable[[str], Callable[..., Tensor]],
    device: torch.device,
    relative_error: Measure,
) -> None:
    inputs = make_inputs(gate, 2, 16, (64, 48))
    expected = outputs_and_gradients(reference, inputs)
    plain = outputs_and_gradients(reference, cast(inputs, torch.float16, device))
    for name, value in outputs_and_gradients(operator(way), cast(inputs, torch.float16, device)).items():
        assert relative_error(value, expected[name]) < rounding_bound(plain[name], expected[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_frozen_base_without_bias(
    way: str, operator: Callable[[str], Callable[..., Tensor]], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs("sparse", 4, 8, (64, 48))
    del inputs["bias"]
    inputs["weight"].requires_grad_(False)
    given = {**cast(inputs, torch.float32, device), "weight": inputs["weight"].to(device, torch.float32)}
    expected = outputs_and_gradients(lambda **rest: reference(**rest, bias=None), inputs)
    got = outputs_and_gradients(lambda **rest: operator(way)(**rest, bias=None), given)
    assert set(got) == {"out", "x", "lora_a", "lora_b", "gate"}
    for name, value in got.items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("wanted", ["x", "bias", "lora_a", "gate"])
def test_each_gradient_alone(wanted: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs("dense", 2, 8, (32, 40))
    for name, value in inputs.items():
        value.requires_grad_(name == wanted)
    given = {
        name: value.detach().to(device, torch.float32).requires_grad_(name == wanted) for name, value in inputs.items()
    }
    expected = outputs_and_gradients(reference, inputs)
    got = outputs_and_gradients(mixture_of_lora_linear, given, backend="triton")
    assert relative_error(got[wanted], expected[wanted]) < OPERATOR_FP32


@pytest.mark.parametrize("way", WAYS)
def test_any_leading_dimensions_and_strides(
    way: str, operator: Callable[[str], Callable[..., Tensor]], device: torch.device, relative_error: Measure
) -> None:
    inputs = cast(make_inputs("dense_shared", 2, 8, (32, 40)), torch.float32, device)
    wide = torch.randn(2, 1, 3, 64, device=device)
    for x in (wide[..., ::2], wide[..., :32], wide.flatten(0, 2)[:, 32:]):
        inputs["x"] = x
        expected = reference(**cast(inputs, torch.float64, torch.device("cpu")))
        assert relative_error(operator(way)(**inputs), expected) < OPERATOR_FP32


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_same_call_gives_the_same_bits(
    way: str, operator: Callable[[str], Callable[..., Tensor]], device: torch.device
) -> None:
    inputs = cast(make_inputs("channel", 2, 8, (32, 40), (4, 20)), torch.float32, device)
    first, second = (outputs_and_gradients(operator(way), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("form", ["channel", "dense", "sparse"])
def test_opcheck(form: str, device: torch.device) -> None:
    inputs = cast(make_inputs(form, 2, 8, (32, 40), (6,)), torch.float32, device)
    ids = inputs.get("task_ids", inputs.get("expert_ids"))
    if form == "sparse":
        inputs["gate"] = torch.rand(6, 2, device=device).requires_grad_()
    names = ("x", "weight", "bias", "lora_a", "lora_b", "gate")
    arguments = (*(inputs[name] for name in names), ids, form, 1)
    torch.library.opcheck(torch.ops.lion_kernels.mixture_of_lora_linear.default, arguments)
    x, weight, bias, *rest = (value.detach() if isinstance(value, Tensor) else value for value in arguments)
    y, hidden = torch.ops.lion_kernels.mixture_of_lora_linear(x, weight, bias, *rest)
    backward = torch.ops.lion_kernels.mixture_of_lora_linear_backward.default
    for needs in ([True] * 6, [True, False, False, True, False, False]):
        given = (torch.ones_like(y), x, hidden, weight, *rest, needs)
        torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("gate", GATES)
def test_the_op_without_triton(gate: str, monkeypatch: pytest.MonkeyPatch, relative_error: Measure) -> None:
    """On a CPU that does not interpret, the custom ops are the plain formulas."""
    monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    monkeypatch.setattr(MODULE, "choose_backend", lambda *_: "triton")
    inputs = make_inputs(gate, 3, 8, (40, 24))
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(mixture_of_lora_linear, cast(inputs, torch.float64)).items():
        assert relative_error(value, expected[name]) < 1e-12, name


@pytest.mark.parametrize("around", ["compile", "checkpoint"])
def test_inside_other_machinery(around: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs("channel", 2, 8, (32, 40))
    expected = outputs_and_gradients(reference, inputs)
    run = {
        "compile": torch.compile(mixture_of_lora_linear, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda **rest: checkpoint(lambda: mixture_of_lora_linear(**rest), use_reentrant=False),
    }[around]
    for name, value in outputs_and_gradients(run, cast(inputs, torch.float32, device), backend="triton").items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("way", WAYS)
def test_autocast(
    way: str, operator: Callable[[str], Callable[..., Tensor]], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs("dense", 2, 8, (32, 40))
    expected = outputs_and_gradients(reference, inputs)
    with torch.autocast(device.type, dtype=torch.float16):
        got = outputs_and_gradients(operator(way), cast(inputs, torch.float32, device))
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < OPERATOR_FP16, name


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_shape(
    data: st.DataObject,
    operator: Callable[[str], Callable[..., Tensor]],
    device: torch.device,
    relative_error: Measure,
) -> None:
    gate, way = data.draw(st.sampled_from(GATES)), data.draw(st.sampled_from(WAYS[1:]))
    experts, rank = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    widths = (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70)))
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    inputs = make_inputs(gate, experts, rank, widths, shape)
    for name in data.draw(st.sets(st.sampled_from(["x", "weight", "lora_a", "lora_b"]))):
        inputs[name] = inputs[name].detach().mT.contiguous().mT.requires_grad_()
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(operator(way), cast(inputs, torch.float32, device)).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


def test_narrow_products_are_fused_and_wide_ones_left_to_the_library() -> None:
    """Adding the update afterwards moves y twice more, which a long product hides."""
    assert MODULE.fuses(16384, 512, 2048, torch.bfloat16)
    assert not MODULE.fuses(16384, 4096, 4096, torch.bfloat16)
    assert not MODULE.fuses(16384, 512, 2048, torch.float32)


def test_cost() -> None:
    forward, backward = MODULE.cost(16384, 4096, 4096, 8, 16, torch.bfloat16)
    assert forward.flops == 2 * 16384 * 4096 * 4096 + 2 * 16384 * 2 * 4096 * 128
    assert forward.bytes == 2 * (2 * 16384 * 4096 + 4096 * 4096 + 2 * 4096 * 128)
    trained = MODULE.cost(16384, 4096, 4096, 8, 16, torch.bfloat16, frozen=False)[1]
    assert trained.flops - backward.flops == 2 * 16384 * 4096 * 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x: expected floating \[..., Din\], got torch.float32 \[\]"),
        ({"gate": torch.zeros(4, 2, 40).bool()}, "gate: expected a floating dtype, got torch.bool"),
        ({"weight": torch.zeros(40, 31)}, r"weight: expected \[Dout, 32\] \(Din from x\), got \[40, 31\]"),
        ({"bias": torch.zeros(41)}, r"bias: expected \[40\], got \[41\]"),
        ({"lora_a": torch.zeros(2, 8, 31)}, r"lora_a: expected \[E, r, 32\] \(Din from x\), got \[2, 8, 31\]"),
        ({"lora_b": torch.zeros(2, 8, 40)}, r"lora_b: expected \[2, 40, 8\], got \[2, 8, 40\]"),
        ({"gate": torch.zeros(4, 2, 32)}, r"gate: expected \[R, 2, 40\] with task_ids, got \[4, 2, 32\]"),
        ({"task_ids": torch.tensor([0, 4, 1])}, r"task_ids: expected values from 0 to 3, got \[4\]"),
        ({"lora_b": torch.zeros(2, 40, 8)}, r"lora_b: expected torch.float64 \(as x\), got torch.float32"),
        ({"bias": torch.zeros(40, device="meta")}, r"bias: expected on cpu \(as x\), got meta"),
        ({"update_input": torch.zeros(3, 5, 32)}, r"update_input: expected \[3, 5, 32\] in torch.float64 like x, got"),
        ({"backend": "triton"}, "x: expected float32, float16 or bfloat16 with backend='triton', got torch.float64"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_of_lora_linear(**{**make_inputs("channel", 2, 8, (32, 40)), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 320, 8192])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", WAYS[1:])
def test_large_sizes_on_a_gpu(
    way: str,
    gate: str,
    rows: int,
    operator: Callable[[str], Callable[..., Tensor]],
    device: torch.device,
    relative_error: Measure,
) -> None:
    inputs = make_inputs(gate, 4, 16, (2048, 5120), (4, rows // 4) if rows > 1 else (1, 1))
    expected = outputs_and_gradients(reference, cast(inputs, torch.float64, device))
    plain = outputs_and_gradients(reference, cast(inputs, torch.bfloat16, device))
    for name, value in outputs_and_gradients(operator(way), cast(inputs, torch.bfloat16, device)).items():
        assert relative_error(value, expected[name]) < 2 * relative_error(plain[name], expected[name]) + 2**-9, name


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS[1:])
def test_two_hundred_calls_and_a_cuda_graph_give_the_same_bits(
    way: str, operator: Callable[[str], Callable[..., Tensor]], device: torch.device
) -> None:
    inputs = cast(make_inputs("channel_by_row", 2, 16, (2048, 5120), (4, 417)), torch.bfloat16, device)
    first = outputs_and_gradients(operator(way), inputs)
    for _ in range(200):
        for name, value in outputs_and_gradients(operator(way), inputs).items():
            assert torch.equal(value, first[name]), name
    with torch.no_grad():
        expected = operator(way)(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = operator(way)(**inputs)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
