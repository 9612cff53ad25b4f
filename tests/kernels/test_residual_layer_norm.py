"""`lion_kernels.residual_layer_norm` against the fp64 reference, with the dropout mask as a tensor."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_kernels.residual_layer_norm import cost, dropout_mask, launch_backward, launch_forward, residual_layer_norm
from lion_reference import residual_layer_norm as reference
from tests.kernels import gradients
from tests.kernels.gradients import Inputs, Measure, cast, gradient_of
from tests.rounding import OPERATOR_FP32, rounding_bound

pytestmark = pytest.mark.usefixtures("poison")
MODULE = sys.modules["lion_kernels.residual_layer_norm"]
EPS = 1e-12
P = 0.25  # of the dropout
SEED = -(2**40) - 12345
DROPOUT: dict[str, Any] = {"dropout_p": P, "seed": SEED}


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", *, x_bias: bool = True
) -> Inputs:
    """The same values in every dtype, as far as it holds them."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:], "x_bias": shape[-1:]}
    values = {name: torch.randn(size, generator=generator) + 0.5 for name, size in sizes.items()}
    if not x_bias:
        del values["x_bias"]
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}


def outputs_and_gradients(operator: Callable[..., Tensor], inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    return gradients.outputs_and_gradients(operator, inputs, eps=EPS, **options)


def mask_like(inputs: Inputs, dropout: dict[str, Any]) -> Tensor | None:
    return dropout_mask(inputs["x"].shape, dropout["dropout_p"], dropout["seed"]) if dropout else None


def exact(inputs: Inputs, dropout: dict[str, Any]) -> Inputs:
    """The reference in fp64, from the values as `inputs` holds them."""
    mask, double = mask_like(inputs, dropout), cast(inputs, torch.float64, "cpu")
    return outputs_and_gradients(reference, double, dropout_mask=None if mask is None else mask.double())


def plain(inputs: Inputs, dropout: dict[str, Any]) -> Inputs:
    """The reference in the dtype of `inputs`."""
    mask = mask_like(inputs, dropout)
    return outputs_and_gradients(reference, inputs, dropout_mask=None if mask is None else mask.to(inputs["x"]))


SHAPES = [(1, 64), (17, 176), (257, 64), (2, 3, 1408), (3, 2048), (2, 4096), (5, 101), (417, 64)]
with_and_without_dropout = pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["", "dropout"])


@with_and_without_dropout
@pytest.mark.parametrize("x_bias", [True, False], ids=["x_bias", ""])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(
    shape: tuple[int, ...], x_bias: bool, dropout: dict[str, Any], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(shape, torch.float32, device, x_bias=x_bias)
    expected = exact(inputs, dropout)
    for name, value in outputs_and_gradients(residual_layer_norm, inputs, **dropout, backend="triton").items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@with_and_without_dropout
@pytest.mark.parametrize("shape", [(17, 176), (2, 3, 1408)])
def test_half_precision_is_no_worse_than_the_plain_formula(
    shape: tuple[int, ...], dropout: dict[str, Any], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(shape, torch.float16, device)
    expected, rounded = exact(inputs, dropout), plain(inputs, dropout)
    for name, value in outputs_and_gradients(residual_layer_norm, inputs, **dropout, backend="triton").items():
        assert value.dtype == torch.float16
        assert relative_error(value, expected[name]) < 2 * relative_error(rounded[name], expected[name]), name


@with_and_without_dropout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_torch_backend(dtype: torch.dtype, dropout: dict[str, Any], relative_error: Measure) -> None:
    inputs = make_inputs((2, 5, 176), dtype)
    expected, rounded = exact(inputs, dropout), plain(inputs, dropout)
    for name, value in outputs_and_gradients(residual_layer_norm, inputs, **dropout, backend="torch").items():
        assert value.dtype == dtype
        error = relative_error(value, expected[name])
        assert error < rounding_bound(rounded[name], expected[name]), name


def test_the_mask_is_philox() -> None:
    """The generator's published answer (Random123's known-answer tests) for key 0 and counter 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for p in (0.1, 0.39, 0.41, 0.6, 0.61, 0.73, 0.74, 0.87, 0.89, 0.99):
        kept = [word / 2**32 >= p for word in words]
        torch.testing.assert_close(dropout_mask((1, 4), p, 0), torch.tensor([kept]) / (1 - p))


def test_the_mask_drops_a_share_of_p_independently() -> None:
    """Everywhere, in neighbouring columns and rows, and from seed to seed, within 5 standard deviations."""
    shape, n = (512, 1003), 512 * 1003
    for p in (0.1, 0.5, 0.9):
        dropped, other = (dropout_mask(shape, p, seed) == 0 for seed in (7, 8))
        assert abs(dropped.double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
        for both in (dropped & other, dropped & dropped.roll(1, 0), dropped & dropped.roll(1, 1)):
            assert abs(both.double().mean() - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5
    assert torch.equal(dropout_mask((3, 4, 5), 0.5, 7).flatten(), dropout_mask((12, 5), 0.5, 7).flatten())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_seeds(backend: str, device: torch.device) -> None:
    """An int and a tensor of it drop the same; without a seed PyTorch's generator decides."""
    inputs = {name: value.detach() for name, value in make_inputs((3, 64), torch.float32, device).items()}

    def run(seed: int | Tensor | None) -> Tensor:
        return residual_layer_norm(**inputs, eps=EPS, dropout_p=0.5, seed=seed, backend=backend)

    assert torch.equal(run(5), run(torch.tensor(5, device=device)))
    assert not torch.equal(run(5), run(6))
    assert not torch.equal(run(5), run(5 + 2**32))
    torch.manual_seed(0)
    first, second = run(None), run(None)
    torch.manual_seed(0)
    assert torch.equal(run(None), first)
    assert not torch.equal(first, second)


def test_strides(device: torch.device, relative_error: Measure) -> None:
    """Halves of packed projections, slices of sequences, transposes, every other channel, one row."""
    packed = torch.randn(4, 6, 2, 48, generator=torch.Generator().manual_seed(0)).to(device)
    parameters = make_inputs((48,), torch.float32, device)
    views = (
        lambda half: packed[..., half, :],
        lambda half: packed[1:, ::2, half],
        lambda half: packed[:, half, 0, ::2],
        lambda half: packed[:, :, half].transpose(0, 1),
        lambda half: packed[half, 0, 0],
    )
    for view in views:
        channels = view(0).shape[-1]
        inputs = {name: value[:channels].detach().requires_grad_() for name, value in parameters.items()}
        inputs |= {"x": view(0).detach().requires_grad_(), "residual": view(1).detach().requires_grad_()}
        expected = exact(inputs, DROPOUT)
        for name, value in outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend="triton").items():
            assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("reduce", [Tensor.sum, lambda out: out.transpose(0, 2)[::3].square().mean()])
def test_strides_of_the_gradient(
    reduce: Callable[[Tensor], Tensor], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs((5, 7, 48), torch.float32, device)
    double = {name: value.detach().cpu().double().requires_grad_() for name, value in inputs.items()}
    out, exact_out = residual_layer_norm(**inputs, eps=EPS, backend="triton"), reference(**double, eps=EPS)
    got = torch.autograd.grad(reduce(out) + out[0, 0, 0], list(inputs.values()))
    expected = torch.autograd.grad(reduce(exact_out) + exact_out[0, 0, 0], list(double.values()))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < OPERATOR_FP32


@with_and_without_dropout
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_mixed_dtypes(backend: str, dropout: dict[str, Any], device: torch.device, relative_error: Measure) -> None:
    """As under autocast: the linear layer's product in half precision, residual and parameters not."""
    inputs = make_inputs((17, 48), torch.float32, device)
    inputs["x"] = inputs["x"].detach().half().requires_grad_()
    expected = exact(inputs, dropout)
    for name, value in outputs_and_gradients(residual_layer_norm, inputs, **dropout, backend=backend).items():
        assert value.dtype == (torch.float16 if name == "x" else torch.float32)
        assert relative_error(value, expected[name]) < (1e-3 if name == "x" else OPERATOR_FP32), name
    inputs["residual"] = inputs["residual"].detach().half().requires_grad_()
    assert residual_layer_norm(**inputs, eps=EPS, **dropout, backend=backend).dtype == torch.float16


@with_and_without_dropout
@pytest.mark.parametrize("trained", [("x",), ("residual",), ("weight",), ("x_bias", "bias"), ("x", "weight", "bias")])
def test_what_is_frozen_has_no_gradient(
    trained: tuple[str, ...], dropout: dict[str, Any], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    expected = exact(inputs, dropout)
    for name, value in inputs.items():
        value.requires_grad_(name in trained)
    out = residual_layer_norm(**inputs, eps=EPS, **dropout, backend="triton")
    out.backward(gradient_of(out))
    for name, value in inputs.items():
        assert (value.grad is not None) == (name in trained)
        if value.grad is not None:
            assert relative_error(value.grad, expected[name]) < OPERATOR_FP32, name


def test_without_gradients_nothing_is_saved(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    trained = residual_layer_norm(**inputs, eps=EPS, **DROPOUT, backend="triton")
    calls = []

    def watch(*args: Any, statistics: bool) -> Any:
        calls.append(statistics)
        return launch_forward(*args, statistics=statistics)

    monkeypatch.setattr(MODULE, "launch_forward", watch)
    with torch.no_grad():
        assert torch.equal(residual_layer_norm(**inputs, eps=EPS, **DROPOUT, backend="triton"), trained)
    frozen = {name: value.detach() for name, value in inputs.items()}
    assert torch.equal(residual_layer_norm(**frozen, eps=EPS, **DROPOUT, backend="triton"), trained)
    assert calls == [False, False]


def test_no_rows(device: torch.device) -> None:
    inputs = make_inputs((0, 64), torch.float32, device)
    got = outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend="triton")
    assert got["out"].shape == got["x"].shape == (0, 64)
    assert torch.equal(got["x_bias"], torch.zeros_like(got["x_bias"]))


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs((257, 176), torch.float32, device)
    first = outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend="triton")
    again = outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("variant", ["all", "without x_bias", "without dropout", "mixed dtypes"])
def test_opcheck(variant: str, interpreted: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' contracts with autograd and the compiler, by the kernels and by the CPU's formula."""
    if not interpreted:
        device = torch.device("cpu")
        monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    inputs = make_inputs((2, 3, 48), torch.float32, device)
    if variant == "mixed dtypes":
        inputs["x"] = inputs["x"].detach().half().requires_grad_()
    x, residual, weight, bias, x_bias = inputs.values()
    x_bias = None if variant == "without x_bias" else x_bias
    seed = None if variant == "without dropout" else torch.tensor(SEED, device=device)
    p = 0.0 if seed is None else P
    arguments = (x, residual, weight, bias, x_bias, seed, p, EPS)
    torch.library.opcheck(torch.ops.lion_kernels.residual_layer_norm.default, arguments)
    grad, statistics = torch.randn(2, 3, 48, device=device), torch.rand(2, 6, device=device)
    for needs in ([True, True, True], [True, True, False], [False, True, True], [False, False, True]):
        arguments = (grad, x, residual, weight, x_bias, seed, statistics, p, needs)
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(torch.ops.lion_kernels.residual_layer_norm_backward.default, arguments)


@with_and_without_dropout
@pytest.mark.parametrize("x_bias", [True, False])
def test_the_operator_by_formula(
    x_bias: bool, dropout: dict[str, Any], monkeypatch: pytest.MonkeyPatch, relative_error: Measure
) -> None:
    monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    inputs = make_inputs((2, 3, 48), torch.float32, x_bias=x_bias)
    expected = exact(inputs, dropout)
    seed, p = (torch.tensor(SEED), P) if dropout else (None, 0.0)

    def operator(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, **rest: Tensor) -> Tensor:
        arguments = (x, residual, weight, bias, rest.get("x_bias"), seed, p, eps)
        return torch.ops.lion_kernels.residual_layer_norm(*arguments)[0]

    for name, value in outputs_and_gradients(operator, inputs).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@with_and_without_dropout
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_without_a_graph_break(
    backend: str, dropout: dict[str, Any], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs((2, 3, 48), torch.float32, device)
    torch.compiler.reset()  # of what other variants of this test compiled, which counts against a limit
    compiled = torch.compile(residual_layer_norm, fullgraph=True, backend="aot_eager")
    expected = exact(inputs, dropout)
    for name, value in outputs_and_gradients(compiled, inputs, **dropout, backend=backend).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name
    with torch.no_grad():
        out = compiled(**inputs, eps=EPS, **dropout, backend=backend)
        assert relative_error(out, expected["out"]) < OPERATOR_FP32
        drawn = [compiled(**inputs, eps=EPS, dropout_p=0.5, backend=backend) for _ in range(2)]
        assert not torch.equal(*drawn)


def test_gradient_checkpointing_drops_the_same_again(device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)

    def checkpointed(**kwargs: Any) -> Any:
        return checkpoint(residual_layer_norm, **kwargs, use_reentrant=False)

    results = []
    for operator in (residual_layer_norm, checkpointed):
        torch.manual_seed(0)
        results.append(outputs_and_gradients(operator, inputs, dropout_p=0.5, backend="triton"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    inputs = make_inputs((17, 48), torch.float32, device)
    inputs |= {name: inputs[name].detach().half().requires_grad_() for name in ("x", "residual")}
    expected = outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend=backend)
    with torch.autocast(device.type, dtype=torch.float16):
        got = outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend=backend)
    assert got["out"].dtype == torch.float16
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_shape_stride_and_mask(data: st.DataObject, device: torch.device, relative_error: Measure) -> None:
    channels = data.draw(st.integers(8, 150), "channels")
    leading = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3), "leading"))
    step = data.draw(st.integers(1, 2), "step")
    before = data.draw(st.integers(0, 3), "before")
    dropout = {"dropout_p": data.draw(st.sampled_from([0.1, 0.5])), "seed": data.draw(st.integers(-(2**63), 2**63 - 1))}
    dropout = dropout if data.draw(st.booleans(), "dropout") else {}
    storage = make_inputs((*leading, before + channels * step), torch.float32, device, x_bias=data.draw(st.booleans()))
    inputs = {name: value.detach()[..., before::step].requires_grad_() for name, value in storage.items()}
    expected = exact(inputs, dropout)
    for name, value in outputs_and_gradients(residual_layer_norm, inputs, **dropout, backend="triton").items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"x": torch.zeros(3, 8).long()}, r"x: expected floating \[..., D\], got torch.int64 \[3, 8\]"),
        ({"residual": torch.zeros(8)}, r"residual: expected floating \[3, 8\] \(from x\), got torch.float32 \[8\]"),
        ({"residual": torch.zeros(3, 8).int()}, r"residual: expected floating \[3, 8\] .*, got torch.int32 \[3, 8\]"),
        ({"weight": torch.zeros(7)}, r"weight: expected floating \[8\] \(D from x\), got torch.float32 \[7\]"),
        ({"bias": torch.zeros(1, 8)}, r"bias: expected floating \[8\] \(D from x\), got torch.float32 \[1, 8\]"),
        ({"x_bias": torch.zeros(8).int()}, r"x_bias: expected floating \[8\] \(D from x\), got torch.int32 \[8\]"),
        ({"bias": torch.zeros(8, device="meta")}, r"bias: expected device cpu \(from x\), got meta"),
        ({"dropout_p": 1.0}, "dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
        ({"dropout_p": -0.1}, "dropout_p: expected 0 <= dropout_p < 1, got -0.1"),
        ({"seed": torch.zeros(1).long()}, r"seed: expected torch.int64 \[\] on cpu, got torch.int64 \[1\]"),
        ({"seed": torch.tensor(0.0)}, r"seed: expected torch.int64 \[\] on cpu, got torch.float32 \[\]"),
        ({"seed": 2**63}, "seed: expected an int64, got 9223372036854775808"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    rows, channels = torch.zeros(3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=message):
        residual_layer_norm(**{"x": rows, "residual": rows, "weight": channels, "bias": channels, "eps": EPS, **change})


def test_what_no_kernel_takes(device: torch.device) -> None:
    double = torch.zeros(3, 8, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="residual: expected float16, bfloat16 or float32 for backend 'triton', got"):
        residual_layer_norm(double.float(), double, double[0], double[0], EPS, backend="triton")
    wide = torch.zeros(1, 4097, device=device)
    with pytest.raises(ValueError, match="x: expected D from 1 to 4096 for backend 'triton', got 4097"):
        residual_layer_norm(wide, wide, wide[0], wide[0], EPS, backend="triton")
    assert residual_layer_norm(double, double, double[0], double[0], EPS).dtype == torch.float64
    assert residual_layer_norm(wide, wide, wide[0], wide[0], EPS).shape == wide.shape


def test_the_interpreter_refuses_bfloat16(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the kernels are compiled here")
    inputs = make_inputs((3, 48), torch.bfloat16)
    for name in inputs:
        mixed = {other: value if other == name else value.float() for other, value in inputs.items()}
        with pytest.raises(ValueError, match=f"^{name}: bfloat16 is not supported by Triton's interpreter"):
            residual_layer_norm(**mixed, eps=EPS, backend="triton")
    x = inputs["x"].detach()
    wide, statistics = x.float(), torch.ones(2, 3)
    with pytest.raises(ValueError, match="grad: bfloat16 is not supported"):
        launch_backward(x, wide, wide, wide[0], None, None, statistics, 0.0, [True, True, False])


def test_cost_counts_what_moves() -> None:
    tensor, channels, statistics = 2 * 16384 * 1408, 2 * 1408, 2 * 4 * 16384
    forward, backward = cost(16384, 1408, torch.bfloat16)
    assert forward.bytes == 3 * tensor + 3 * channels
    assert backward.bytes == 4 * tensor + 5 * channels + statistics
    forward, backward = cost(16384, 1408, torch.bfloat16, dropout=True)
    assert forward.bytes == 3 * tensor + 3 * channels
    assert backward.bytes == 5 * tensor + 5 * channels + statistics


@pytest.mark.gpu
@with_and_without_dropout
@pytest.mark.parametrize("shape", [(1, 1408), (417, 1408), (16384, 768), (1000, 4096)])
def test_bfloat16_on_a_gpu(
    shape: tuple[int, ...], dropout: dict[str, Any], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(shape, torch.bfloat16, device)
    expected, rounded = exact(inputs, dropout), plain(inputs, dropout)
    for name, value in outputs_and_gradients(residual_layer_norm, inputs, **dropout, backend="triton").items():
        assert relative_error(value, expected[name]) < rounding_bound(rounded[name], expected[name]), name


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    row = torch.randn(4096, device=device, dtype=torch.bfloat16)
    x = row.expand(2**19 + 3, 4096).contiguous().requires_grad_()
    out = residual_layer_norm(x, x, row, row, EPS, backend="triton")
    assert torch.equal(out[-1], out[0])
    (dx,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(dx[-1], dx[0])


@pytest.mark.gpu
def test_two_hundred_calls_give_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs((4113, 1408), torch.bfloat16, device)
    first = outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend="triton")
    for _ in range(200):
        again = outputs_and_gradients(residual_layer_norm, inputs, **DROPOUT, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_a_cuda_graph_draws_a_mask_at_each_replay(device: torch.device) -> None:
    inputs = make_inputs((33, 1408), torch.bfloat16, device)
    with torch.no_grad():
        expected = residual_layer_norm(**inputs, eps=EPS, **DROPOUT, backend="triton")
        residual_layer_norm(**inputs, eps=EPS, dropout_p=0.5, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fixed = residual_layer_norm(**inputs, eps=EPS, **DROPOUT, backend="triton")
            drawn = residual_layer_norm(**inputs, eps=EPS, dropout_p=0.5, backend="triton")
    graph.replay()
    assert torch.equal(fixed, expected)
    before = drawn.clone()
    graph.replay()
    assert not torch.equal(drawn, before)
