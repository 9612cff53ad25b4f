"""`lion_kernels.rms_norm` against the fp64 reference, and against where T5LayerNorm rounds."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lion_kernels.rms_norm import cost, launch_backward, launch_forward, rms_norm
from lion_reference import rms_norm as reference
from tests.kernels import gradients
from tests.kernels.gradients import Inputs, Measure, cast, gradient_of
from tests.rounding import OPERATOR_FP32, rounding_bound

pytestmark = pytest.mark.usefixtures("poison")
MODULE = sys.modules["lion_kernels.rms_norm"]
EPS = 1e-6


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The same values in every dtype, as far as it holds them."""
    generator = torch.Generator().manual_seed(0)
    values = {"x": torch.randn(shape, generator=generator) * 3, "weight": torch.randn(shape[-1], generator=generator)}
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}


def outputs_and_gradients(operator: Callable[..., Tensor], inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    return gradients.outputs_and_gradients(operator, inputs, eps=EPS, **options)


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference in fp64, from the values as `inputs` holds them."""
    return outputs_and_gradients(reference, cast(inputs, torch.float64, "cpu"))


SHAPES = [(1, 64), (17, 176), (257, 64), (2, 3, 1408), (3, 2048), (2, 4096), (5, 100), (2, 8192), (3, 4), (417, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape: tuple[int, ...], device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(shape, torch.float32, device)
    expected = exact(inputs)
    for name, value in outputs_and_gradients(rms_norm, inputs, backend="triton").items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("shape", [(17, 176), (2, 3, 1408)])
def test_half_precision_is_no_worse_than_the_plain_formula(
    shape: tuple[int, ...], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(shape, torch.float16, device)
    expected = exact(inputs)
    plain = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(rms_norm, inputs, backend="triton").items():
        assert value.dtype == torch.float16
        assert relative_error(value, expected[name]) < rounding_bound(plain[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_torch_backend(dtype: torch.dtype, relative_error: Measure) -> None:
    inputs = make_inputs((2, 5, 176), dtype)
    expected, plain = exact(inputs), outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(rms_norm, inputs, backend="torch").items():
        assert value.dtype == dtype
        assert relative_error(value, expected[name]) < rounding_bound(plain[name], expected[name]), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_rounds_where_t5_rounds(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Bit for bit in half precision, where one rounding more or less changes a quarter of the values."""
    norm = T5LayerNorm(176, EPS)
    inputs = make_inputs((33, 176), torch.float32)
    norm.weight.data = inputs["weight"].detach().to(weight_dtype)
    norm, x = norm.to(device), inputs["x"].detach().to(device, x_dtype)
    with torch.no_grad():
        expected = norm(x)
        got = rms_norm(x, norm.weight, EPS, backend=backend)
    assert got.dtype == expected.dtype == weight_dtype
    if weight_dtype == torch.float16:
        # The sums' order differs, which shows where the normalised value falls in the middle between two numbers.
        assert (got != expected).float().mean() < 0.005
    torch.testing.assert_close(got, expected)


def test_torch_backend_is_t5_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = make_inputs((33, 176), dtype)
        norm = T5LayerNorm(176, EPS)
        norm.weight = torch.nn.Parameter(inputs["weight"].detach())
        assert torch.equal(rms_norm(**inputs, eps=EPS, backend="torch"), norm(inputs["x"]))


def test_strides_of_x(device: torch.device, relative_error: Measure) -> None:
    """Halves of packed projections, slices of sequences, transposes, every other channel, one row."""
    packed = torch.randn(4, 6, 2, 48, generator=torch.Generator().manual_seed(0)).to(device)
    weight = make_inputs((48,), torch.float32, device)["weight"]
    views = (
        packed[..., 0, :],
        packed[1:, ::2, 1],
        packed[:, 0, 0, ::2],
        packed[:, :, 0].transpose(0, 1),
        packed[0, 0, 0],
    )
    for x in views:
        assert x.dim() == 1 or not x.is_contiguous()
        inputs = {"x": x.detach().requires_grad_(), "weight": weight[: x.shape[-1]]}
        expected = exact(inputs)
        for name, value in outputs_and_gradients(rms_norm, inputs, backend="triton").items():
            assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize(
    "reduce",
    [Tensor.sum, lambda out: out[..., ::2].sum(), lambda out: out.transpose(0, 2)[::3].square().mean()],
    ids=["expanded", "every other channel", "transposed"],
)
def test_strides_of_the_gradient(
    reduce: Callable[[Tensor], Tensor], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs((5, 7, 48), torch.float32, device)
    double = {name: value.detach().cpu().double().requires_grad_() for name, value in inputs.items()}
    got = torch.autograd.grad(reduce(rms_norm(**inputs, eps=EPS, backend="triton")), list(inputs.values()))
    expected = torch.autograd.grad(reduce(reference(**double, eps=EPS)), list(double.values()))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < OPERATOR_FP32


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_has_no_gradient(frozen: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs((17, 176), torch.float32, device)
    expected = exact(inputs)
    inputs[frozen].requires_grad_(False)
    (trained,) = set(inputs) - {frozen}
    out = rms_norm(**inputs, eps=EPS, backend="triton")
    out.backward(gradient_of(out))
    assert inputs[frozen].grad is None
    assert inputs[trained].grad is not None
    assert relative_error(inputs[trained].grad, expected[trained]) < OPERATOR_FP32


def test_without_gradients_nothing_is_saved(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((17, 176), torch.float32, device)
    trained = rms_norm(**inputs, eps=EPS, backend="triton")
    calls = []

    def watch(*args: Any, statistics: bool) -> Any:
        calls.append(statistics)
        return launch_forward(*args, statistics=statistics)

    monkeypatch.setattr(MODULE, "launch_forward", watch)
    with torch.no_grad():
        assert torch.equal(rms_norm(**inputs, eps=EPS, backend="triton"), trained)
    frozen = {name: value.detach() for name, value in inputs.items()}
    assert torch.equal(rms_norm(**frozen, eps=EPS, backend="triton"), trained)
    assert calls == [False, False]


def test_no_rows(device: torch.device) -> None:
    inputs = make_inputs((0, 3, 64), torch.float32, device)
    out = rms_norm(**inputs, eps=EPS, backend="triton")
    dx, dweight = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert out.shape == dx.shape == (0, 3, 64)
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs((257, 176), torch.float32, device)
    first = outputs_and_gradients(rms_norm, inputs, backend="triton")
    again = outputs_and_gradients(rms_norm, inputs, backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_opcheck(
    dtypes: tuple[torch.dtype, torch.dtype], interpreted: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators' contracts with autograd and the compiler, by the kernels and by the CPU's formula."""
    if not interpreted:
        device = torch.device("cpu")
        monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    inputs = make_inputs((3, 5, 48), torch.float32, device)
    x, weight = (
        inputs["x"].detach().to(dtypes[0]).requires_grad_(),
        inputs["weight"].detach().to(dtypes[1]).requires_grad_(),
    )
    torch.library.opcheck(torch.ops.lion_kernels.rms_norm.default, (x, weight, EPS))
    grad, rstd = torch.randn(3, 5, 48, device=device, dtype=dtypes[1]), torch.rand(15, device=device)
    for needs in ([True, True], [True, False], [False, True]):
        arguments = (grad, x.detach(), weight.detach(), rstd, needs)
        torch.library.opcheck(torch.ops.lion_kernels.rms_norm_backward.default, arguments)


def test_the_operator_by_formula(monkeypatch: pytest.MonkeyPatch, relative_error: Measure) -> None:
    monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    inputs = make_inputs((3, 5, 48), torch.float32)
    expected = exact(inputs)

    def operator(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.ops.lion_kernels.rms_norm(x, weight, eps)[0]

    for name, value in outputs_and_gradients(operator, inputs).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_without_a_graph_break(backend: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs((3, 5, 48), torch.float32, device)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    expected = exact(inputs)
    for name, value in outputs_and_gradients(compiled, inputs, backend=backend).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name
    with torch.no_grad():
        assert relative_error(compiled(**inputs, eps=EPS, backend=backend), expected["out"]) < OPERATOR_FP32


def test_gradient_checkpointing(device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)

    def checkpointed(**kwargs: Any) -> Any:
        return checkpoint(rms_norm, **kwargs, use_reentrant=False)

    expected = outputs_and_gradients(rms_norm, inputs, backend="triton")
    got = outputs_and_gradients(checkpointed, inputs, backend="triton")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    inputs["x"] = inputs["x"].detach().half().requires_grad_()
    expected = outputs_and_gradients(rms_norm, inputs, backend=backend)
    with torch.autocast(device.type, dtype=torch.float16):
        got = outputs_and_gradients(rms_norm, inputs, backend=backend)
    assert got["out"].dtype == torch.float32
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_stride(data: st.DataObject, device: torch.device, relative_error: Measure) -> None:
    channels = data.draw(st.integers(4, 150), "channels")
    leading = data.draw(st.lists(st.integers(1, 5), max_size=3), "leading")
    before, after = data.draw(st.integers(0, 3), "before"), data.draw(st.integers(0, 3), "after")
    step = data.draw(st.integers(1, 2), "step")
    storage = make_inputs((*leading, before + channels * step + after), torch.float32, device)
    inputs = {
        "x": storage["x"].detach()[..., before : before + channels * step : step].requires_grad_(),
        "weight": storage["weight"].detach()[:channels].requires_grad_(),
    }
    expected = exact(inputs)
    for name, value in outputs_and_gradients(rms_norm, inputs, backend="triton").items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"x": torch.zeros(3, 8).long()}, r"x: expected floating \[..., D\], got torch.int64 \[3, 8\]"),
        ({"weight": torch.zeros(7)}, r"weight: expected floating \[8\] \(D from x\), got torch.float32 \[7\]"),
        ({"weight": torch.zeros(1, 8)}, r"weight: expected floating \[8\] \(D from x\), got torch.float32 \[1, 8\]"),
        ({"weight": torch.zeros(8).int()}, r"weight: expected floating \[8\] \(D from x\), got torch.int32 \[8\]"),
        ({"weight": torch.zeros(8, device="meta")}, r"weight: expected device cpu \(from x\), got meta"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": EPS, **change})


def test_what_no_kernel_takes(device: torch.device) -> None:
    double = torch.zeros(3, 8, dtype=torch.float64, device=device)
    with pytest.raises(
        ValueError, match=r"x: expected float16, bfloat16 or float32 for backend 'triton', got torch\.fl"
    ):
        rms_norm(double, double[0], EPS, backend="triton")
    wide = torch.zeros(1, 8193, device=device)
    with pytest.raises(ValueError, match="x: expected D from 1 to 8192 for backend 'triton', got 8193"):
        rms_norm(wide, wide[0], EPS, backend="triton")
    assert rms_norm(double, double[0], EPS).dtype == torch.float64
    assert rms_norm(wide, wide[0], EPS).shape == wide.shape


def test_the_interpreter_refuses_bfloat16(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the kernels are compiled here")
    inputs = make_inputs((3, 48), torch.bfloat16)
    with pytest.raises(ValueError, match="x: bfloat16 is not supported by Triton's interpreter"):
        rms_norm(**inputs, eps=EPS, backend="triton")
    x = inputs["x"].detach()
    with pytest.raises(ValueError, match="x: bfloat16 is not supported"):
        launch_backward(x.float(), x, x[0], torch.ones(3), [True, False])


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16384, 2048, torch.bfloat16)
    tensor, weight, rstd = 2 * 16384 * 2048, 2 * 2048, 4 * 16384
    assert forward.bytes == 2 * tensor + weight
    assert backward.bytes == 3 * tensor + 2 * weight + rstd


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2048), (417, 1408), (16384, 2048), (1000, 4096)])
def test_bfloat16_on_a_gpu(shape: tuple[int, ...], device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(shape, torch.bfloat16, device)
    expected = exact(inputs)
    plain = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(rms_norm, inputs, backend="triton").items():
        assert relative_error(value, expected[name]) < 2 * relative_error(plain[name], expected[name]), name


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    x = torch.randn(1, 4096, device=device, dtype=torch.bfloat16).expand(2**19 + 3, 4096).contiguous().requires_grad_()
    weight = torch.randn(4096, device=device, dtype=torch.bfloat16)
    out = rms_norm(x, weight, EPS, backend="triton")
    assert torch.equal(out[-1], out[0])
    (dx,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(dx[-1], dx[0])


@pytest.mark.gpu
def test_two_hundred_calls_and_a_cuda_graph_give_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs((4113, 2048), torch.bfloat16, device)
    first = outputs_and_gradients(rms_norm, inputs, backend="triton")
    for _ in range(200):
        again = outputs_and_gradients(rms_norm, inputs, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        rms_norm(**inputs, eps=EPS, backend="triton")  # a kernel of its own, which no capture may load
        with torch.cuda.graph(graph):
            out = rms_norm(**inputs, eps=EPS, backend="triton")
    graph.replay()
    assert torch.equal(out, first["out"])
