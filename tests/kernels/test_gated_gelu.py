"""`lion_kernels.gated_gelu` against the fp64 reference."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_kernels.gated_gelu import cost, gated_gelu, launch_backward
from lion_reference import gated_gelu as reference
from tests.kernels.gradients import Inputs, Measure, cast, outputs_and_gradients
from tests.rounding import OPERATOR_FP32

pytestmark = pytest.mark.usefixtures("poison")
MODULE = sys.modules["lion_kernels.gated_gelu"]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """The same values in every dtype, as far as it holds them; gates from far left to far right of zero."""
    generator = torch.Generator().manual_seed(0)
    values = {"gate": torch.randn(shape, generator=generator) * 2, "up": torch.randn(shape, generator=generator)}
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}


def exact(inputs: Inputs) -> Inputs:
    """The reference in fp64, from the values as `inputs` holds them."""
    return outputs_and_gradients(reference, cast(inputs, torch.float64, "cpu"))


SHAPES = [(1, 64), (17, 176), (257, 8), (2, 3, 1408), (3, 2048), (2, 5120), (5, 1025), (7, 1), (33,), (417, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape: tuple[int, ...], device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(shape, torch.float32, device)
    expected = exact(inputs)
    for name, value in outputs_and_gradients(gated_gelu, inputs, backend="triton").items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("shape", [(17, 176), (2, 3, 1408)])
def test_half_precision_is_no_worse_than_the_plain_formula(
    shape: tuple[int, ...], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(shape, torch.float16, device)
    expected, plain = exact(inputs), outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(gated_gelu, inputs, backend="triton").items():
        assert value.dtype == torch.float16
        assert relative_error(value, expected[name]) < 2 * relative_error(plain[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_torch_backend(dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 5, 176), dtype)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(gated_gelu, inputs, backend="torch").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy squares the gate
def test_far_from_zero(device: torch.device) -> None:
    """Where the GELU is the identity or nothing, nothing overflows."""
    gate = torch.tensor([-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e30], device=device, requires_grad=True)
    out = gated_gelu(gate, torch.ones_like(gate), backend="triton")
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    assert out.tolist() == [0, 0, 0, 0, 20, 100, gate[-1].item()]
    assert dgate.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_strides(device: torch.device, relative_error: Measure) -> None:
    """Halves of packed projections, slices of sequences, transposes, every other channel, one row."""
    packed = torch.randn(4, 6, 2, 48, generator=torch.Generator().manual_seed(0)).to(device)
    views = (
        lambda half: packed[..., half, :],
        lambda half: packed[1:, ::2, half],
        lambda half: packed[:, half, 0, ::2],
        lambda half: packed[:, :, half].transpose(0, 1),
        lambda half: packed[half, 0, 0],
    )
    for view in views:
        inputs = {"gate": view(0).detach().requires_grad_(), "up": view(1).detach().requires_grad_()}
        expected = exact(inputs)
        for name, value in outputs_and_gradients(gated_gelu, inputs, backend="triton").items():
            assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("reduce", [Tensor.sum, lambda out: out.transpose(0, 2)[::3].square().mean()])
def test_strides_of_the_gradient(
    reduce: Callable[[Tensor], Tensor], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs((5, 7, 48), torch.float32, device)
    double = {name: value.detach().cpu().double().requires_grad_() for name, value in inputs.items()}
    got = torch.autograd.grad(reduce(gated_gelu(**inputs, backend="triton")), list(inputs.values()))
    expected = torch.autograd.grad(reduce(reference(**double)), list(double.values()))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < OPERATOR_FP32


def test_backward_saves_the_inputs_alone(device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_gelu(**inputs, backend="triton")
    assert [tensor.data_ptr() for tensor in saved] == [value.data_ptr() for value in inputs.values()]


def test_a_checkpoint_recomputes_it_but_not_the_product_after_it(device: torch.device) -> None:
    """As the documentation shows: of a trained linear layer's input nothing is held."""
    gate, up = make_inputs((17, 48), torch.float32, device).values()
    weight = torch.randn(32, 48, device=device, requires_grad=True)
    calls, held = [], []

    def gelu_and_down(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        out = gated_gelu(gate, up, backend="triton")
        calls.append("gated_gelu")
        out = F.linear(out, weight)
        calls.append("linear")
        return out

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    expected = torch.autograd.grad(gelu_and_down(gate, up, weight).sum(), (gate, up, weight))
    calls.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out: Any = checkpoint(gelu_and_down, gate, up, weight, use_reentrant=False)
    given = {tensor.data_ptr() for tensor in (gate, up, weight)}
    assert all(tensor.numel() == 0 or tensor.data_ptr() in given for tensor in held)
    got = torch.autograd.grad(out.sum(), (gate, up, weight))
    assert calls == ["gated_gelu", "linear", "gated_gelu"]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_without_gradients_the_result_is_the_same(device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    trained = gated_gelu(**inputs, backend="triton")
    with torch.no_grad():
        out = gated_gelu(**inputs, backend="triton")
    assert out.grad_fn is None
    assert torch.equal(out, trained)


def test_no_rows(device: torch.device) -> None:
    got = outputs_and_gradients(gated_gelu, make_inputs((0, 3, 64), torch.float32, device), backend="triton")
    assert all(value.shape == (0, 3, 64) for value in got.values())


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs((257, 176), torch.float32, device)
    first = outputs_and_gradients(gated_gelu, inputs, backend="triton")
    again = outputs_and_gradients(gated_gelu, inputs, backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("interpreted", [True, False])
def test_opcheck(interpreted: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' contracts with autograd and the compiler, by the kernels and by the CPU's formula."""
    if not interpreted:
        device = torch.device("cpu")
        monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    gate, up = make_inputs((3, 5, 48), torch.float32, device).values()
    for halves in ((gate, up), (gate.detach().transpose(0, 1), up.detach().transpose(0, 1))):
        torch.library.opcheck(torch.ops.lion_kernels.gated_gelu.default, halves)
        for needs in ([True, True], [True, False]):
            arguments = (torch.randn(halves[0].shape, device=device), *(half.detach() for half in halves), needs)
            torch.library.opcheck(torch.ops.lion_kernels.gated_gelu_backward.default, arguments)


def test_the_operator_by_formula(monkeypatch: pytest.MonkeyPatch, relative_error: Measure) -> None:
    monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    inputs = make_inputs((3, 5, 48), torch.float32)
    expected = exact(inputs)
    for name, value in outputs_and_gradients(torch.ops.lion_kernels.gated_gelu, inputs).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_without_a_graph_break(backend: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs((3, 5, 48), torch.float32, device)
    torch.compiler.reset()
    compiled = torch.compile(gated_gelu, fullgraph=True, backend="aot_eager")
    expected = exact(inputs)
    for name, value in outputs_and_gradients(compiled, inputs, backend=backend).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name
    with torch.no_grad():
        assert relative_error(compiled(**inputs, backend=backend), expected["out"]) < OPERATOR_FP32


def test_gradient_checkpointing(device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)

    def checkpointed(**kwargs: Any) -> Any:
        return checkpoint(gated_gelu, **kwargs, use_reentrant=False)

    expected = outputs_and_gradients(gated_gelu, inputs, backend="triton")
    got = outputs_and_gradients(checkpointed, inputs, backend="triton")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    expected = outputs_and_gradients(gated_gelu, inputs, backend=backend)
    with torch.autocast(device.type, dtype=torch.float16):
        got = outputs_and_gradients(gated_gelu, inputs, backend=backend)
    assert all(got[name].dtype == torch.float32 for name in got)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_stride(data: st.DataObject, device: torch.device, relative_error: Measure) -> None:
    channels = data.draw(st.integers(1, 150), "channels")
    leading = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3), "leading"))
    step, before = data.draw(st.integers(1, 2), "step"), data.draw(st.integers(0, 3), "before")
    packed = make_inputs((*leading, 2, before + channels * step), torch.float32, device)["gate"].detach()
    gate, up = packed[..., before::step].unbind(-2)
    inputs = {"gate": gate.requires_grad_(), "up": up.requires_grad_()}
    expected = exact(inputs)
    for name, value in outputs_and_gradients(gated_gelu, inputs, backend="triton").items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(())}, r"gate: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"gate": torch.zeros(3, 8).long()}, r"gate: expected floating \[..., D\], got torch.int64 \[3, 8\]"),
        ({"up": torch.zeros(8)}, r"up: expected torch.float32 \[3, 8\] on cpu \(from gate\), got torch.float32 \[8\]"),
        ({"up": torch.zeros(3, 8).half()}, r"up: expected torch.float32 \[3, 8\] .*, got torch.float16 \[3, 8\]"),
        ({"up": torch.zeros(3, 8, device="meta")}, r"up: expected .* on cpu \(from gate\), got .* on meta"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_gelu(**{"gate": torch.zeros(3, 8), "up": torch.zeros(3, 8), **change})


def test_what_no_kernel_takes(device: torch.device) -> None:
    double = torch.zeros(3, 8, dtype=torch.float64, device=device)
    with pytest.raises(
        ValueError, match=r"gate: expected float16, bfloat16 or float32 for backend 'triton', got torch\.float64"
    ):
        gated_gelu(double, double, backend="triton")
    assert gated_gelu(double, double).dtype == torch.float64


def test_the_interpreter_refuses_bfloat16(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the kernels are compiled here")
    gate, up = make_inputs((3, 48), torch.bfloat16).values()
    with pytest.raises(ValueError, match="gate: bfloat16 is not supported by Triton's interpreter"):
        gated_gelu(gate, up, backend="triton")
    with pytest.raises(ValueError, match="gate: bfloat16 is not supported"):
        launch_backward(gate.float(), gate, up, [True, True])


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16384, 5120, torch.bfloat16)
    tensor = 2 * 16384 * 5120
    assert forward.bytes == 3 * tensor
    assert backward.bytes == 5 * tensor


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 5120), (417, 2816), (16384, 5120)])
def test_bfloat16_on_a_gpu(shape: tuple[int, ...], device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(shape, torch.bfloat16, device)
    expected, plain = exact(inputs), outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(gated_gelu, inputs, backend="triton").items():
        assert relative_error(value, expected[name]) < 2 * relative_error(plain[name], expected[name]), name


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    row = torch.randn(5120, device=device, dtype=torch.bfloat16)
    gate = row.expand(2**19, 5120).contiguous().requires_grad_()
    out = gated_gelu(gate, gate, backend="triton")
    assert torch.equal(out[-1], out[0])
    (dgate,) = torch.autograd.grad(out, gate, out.detach())
    assert torch.equal(dgate[-1], dgate[0])


@pytest.mark.gpu
def test_a_cuda_graph_gives_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs((4113, 5120), torch.bfloat16, device)
    with torch.no_grad():
        expected = gated_gelu(**inputs, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gated_gelu(**inputs, backend="triton")
    for _ in range(200):
        graph.replay()
        assert torch.equal(out, expected)
