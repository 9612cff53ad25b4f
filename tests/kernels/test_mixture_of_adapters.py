"""`lion_kernels.mixture_of_adapters` against the fp64 reference: outputs, gradients, dtypes, errors."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_kernels import mixture_of_adapters
from lion_kernels.core.cost import H200, floor_seconds
from lion_reference import mixture_of_adapters as reference
from tests.kernels.gradients import Inputs, Measure, cast, outputs_and_gradients
from tests.rounding import OPERATOR_FP16, OPERATOR_FP32, rounding_bound

MODULE = importlib.import_module("lion_kernels.mixture_of_adapters")  # the function has the module's name
GATES = ("channel", "channel_by_row", "dense", "dense_by_sequence", "dense_shared", "sparse")
BACKENDS = ("torch", "triton")


def make_inputs(gate: str, experts: int, rank: int, channels: int, shape: tuple[int, ...] = (3, 5)) -> Inputs:
    """fp64 inputs of one gate form, every floating tensor asking for its gradient."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    inputs: Inputs = {
        "x": randn(*shape, channels),
        "down_weight": randn(experts, rank, channels),
        "down_bias": randn(experts, rank),
        "up_weight": randn(experts, channels, rank),
        "up_bias": randn(experts, channels),
        "residual": randn(*shape, channels),
    }
    if gate.startswith("channel"):
        rows = shape if gate == "channel_by_row" else shape[:1]
        ids = torch.randint(0, 4, rows, generator=generator)
        return {**inputs, "gate": randn(4, experts, channels), "task_ids": ids}
    if gate == "sparse":
        ids = torch.randint(-1, experts, (*shape, min(2, experts)), generator=generator)
        return {**inputs, "gate": randn(*ids.shape), "expert_ids": ids}
    leading = {"dense": shape, "dense_by_sequence": shape[:1], "dense_shared": ()}[gate]
    return {**inputs, "gate": randn(*leading, experts)}


SIZES = [
    (1, 4, 64, (3, 5), "identity"),
    (2, 16, 72, (2, 17), "relu"),
    (3, 8, 40, (257,), "relu"),
    (8, 12, 32, (1, 1), "identity"),
]
# Models' widths, from the narrowest to the widest: every rank, 1 to 16 experts, and rows that no tile divides.
MODEL_SIZES = [
    ("channel", 2, 64, 1408, (1, 17)),
    ("channel_by_row", 8, 4, 2048, (3,)),
    ("dense", 3, 16, 4096, (1,)),
    ("dense_by_sequence", 1, 8, 176, (1, 417)),
    ("sparse", 16, 64, 64, (17,)),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("experts", "rank", "channels", "shape", "activation"), SIZES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(
    backend: str,
    gate: str,
    experts: int,
    rank: int,
    channels: int,
    shape: tuple[int, ...],
    activation: str,
    device: torch.device,
    relative_error: Measure,
) -> None:
    inputs = make_inputs(gate, experts, rank, channels, shape)
    expected = outputs_and_gradients(reference, inputs, activation=activation)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        if backend == "triton" and dtype == torch.float64:
            continue
        given = cast(inputs, dtype, device)
        got = outputs_and_gradients(mixture_of_adapters, given, activation=activation, backend=backend)
        for name, value in got.items():
            assert value.dtype == dtype
            assert relative_error(value, expected[name]) < tolerance, (name, dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("gate", "experts", "rank", "channels", "shape"), MODEL_SIZES)
def test_sizes_of_models(
    gate: str,
    experts: int,
    rank: int,
    channels: int,
    shape: tuple[int, ...],
    device: torch.device,
    relative_error: Measure,
) -> None:
    inputs = make_inputs(gate, experts, rank, channels, shape)
    expected = outputs_and_gradients(reference, inputs)
    got = outputs_and_gradients(mixture_of_adapters, cast(inputs, torch.float32, device), backend="triton")
    for name, value in got.items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("gate", GATES)
def test_without_gradients_few_rows_are_split(
    gate: str, rows: int, device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(gate, 4, 16, 640, (1, rows))
    with torch.no_grad():
        out = mixture_of_adapters(**cast(inputs, torch.float32, device), backend="triton")
    assert relative_error(out, reference(**inputs)) < OPERATOR_FP32


@pytest.mark.parametrize(("gate", "tasks", "experts", "rank"), [("channel_by_row", 6, 2, 64), ("sparse", 0, 16, 24)])
def test_many_tasks_and_many_experts(
    gate: str, tasks: int, experts: int, rank: int, device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(gate, experts, rank, 48, (2, 9))
    if tasks:
        generator = torch.Generator().manual_seed(2)
        inputs["gate"] = torch.randn(tasks, experts, 48, generator=generator, dtype=torch.float64).requires_grad_()
        inputs["task_ids"] = torch.randint(0, tasks, (2, 9), generator=generator)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(
        mixture_of_adapters, cast(inputs, torch.float32, device), backend="triton"
    ).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [16, 64])  # backward's product is turned from 64 on
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_no_worse_than_the_plain_formula(
    backend: str, gate: str, rank: int, dtype: torch.dtype, device: torch.device, relative_error: Measure
) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes something else in bfloat16")
    inputs = make_inputs(gate, 2, rank, 64)
    expected = outputs_and_gradients(reference, inputs)
    plain = outputs_and_gradients(reference, cast(inputs, dtype, device))
    got = outputs_and_gradients(mixture_of_adapters, cast(inputs, dtype, device), backend=backend)
    for name, value in got.items():
        assert relative_error(value, expected[name]) < rounding_bound(plain[name], expected[name]), name


@pytest.mark.parametrize("absent", ["down_bias", "up_bias", "residual"])
@pytest.mark.parametrize("gate", ["channel", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_may_be_left_out(
    backend: str, gate: str, absent: str, device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(gate, 2, 8, 32)
    del inputs[absent]
    biases = {name: None for name in ("down_bias", "up_bias") if name == absent}
    expected = outputs_and_gradients(lambda **given: reference(**given, **biases), inputs)
    got = outputs_and_gradients(
        lambda **given: mixture_of_adapters(**given, **biases, backend=backend), cast(inputs, torch.float32, device)
    )
    for name, value in got.items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("wanted", ["x", "down_weight", "up_bias", "gate", "residual"])
@pytest.mark.parametrize("gate", ["channel", "sparse"])
def test_each_gradient_alone(gate: str, wanted: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(gate, 2, 8, 32)
    for name, value in inputs.items():
        value.requires_grad_(name == wanted)
    given = {
        name: value.to(device, torch.float32 if value.is_floating_point() else None) for name, value in inputs.items()
    }
    given[wanted] = given[wanted].detach().requires_grad_()
    expected = outputs_and_gradients(reference, inputs)
    got = outputs_and_gradients(mixture_of_adapters, given, backend="triton")
    assert relative_error(got[wanted], expected[wanted]) < OPERATOR_FP32


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_dimensions_and_strides(
    backend: str, shape: tuple[int, ...], device: torch.device, relative_error: Measure
) -> None:
    inputs = cast(make_inputs("dense_shared", 2, 8, 32), torch.float32, device)
    wide = torch.randn(*shape, 64, device=device)
    for x, residual in ((wide[..., ::2], wide[..., 1::2].flip(0)), (wide[..., :32], wide[..., 32:])):
        assert not x.is_contiguous()
        inputs |= {"x": x, "residual": residual}
        expected = reference(**cast(inputs, torch.float64, torch.device("cpu")))
        assert relative_error(mixture_of_adapters(**inputs, backend=backend), expected) < OPERATOR_FP32


def test_a_batch_of_mixed_tasks_is_its_sequences() -> None:
    inputs = make_inputs("channel", 2, 8, 32)
    together = mixture_of_adapters(**inputs)
    for sequence in range(3):
        one = {name: inputs[name][sequence : sequence + 1] for name in ("x", "residual", "task_ids")}
        torch.testing.assert_close(mixture_of_adapters(**{**inputs, **one})[0], together[sequence])


@pytest.mark.parametrize("gate", ["channel", "sparse"])
def test_the_same_call_gives_the_same_bits(gate: str, device: torch.device) -> None:
    inputs = cast(make_inputs(gate, 2, 8, 32, (4, 40)), torch.float32, device)
    first, second = (outputs_and_gradients(mixture_of_adapters, inputs, backend="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def op_arguments(gate: str, device: torch.device) -> tuple[Any, ...]:
    inputs = cast(make_inputs(gate, 2, 8, 32, (2, 3)), torch.float32, device)
    form = gate.split("_")[0]
    ids = inputs.get("task_ids", inputs.get("expert_ids"))
    weights = (inputs["down_weight"], inputs["down_bias"], inputs["up_weight"], inputs["up_bias"])
    weight_of_rows = inputs["gate"].flatten(0, 1) if form != "channel" else inputs["gate"]
    if form == "sparse":
        weight_of_rows = torch.rand(6, 2, device=device).requires_grad_()
        ids = ids.flatten(0, 1)
    rows_per_gate = 3 if gate == "channel" else 1
    x, residual = inputs["x"].flatten(0, 1), inputs["residual"].flatten(0, 1)
    return (x, *weights, weight_of_rows, ids, residual, form, rows_per_gate, True)


@pytest.mark.parametrize("gate", ["channel", "dense", "sparse"])
def test_opcheck(gate: str, device: torch.device) -> None:
    arguments = op_arguments(gate, device)
    detached = [value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in arguments]  # fmt: skip
    torch.library.opcheck(torch.ops.lion_kernels.mixture_of_adapters.default, tuple(detached))
    x, *weights_and_gate, residual, form, rows_per_gate, relu = (
        value.detach() if isinstance(value, Tensor) else value for value in arguments
    )
    _, hidden = torch.ops.lion_kernels.mixture_of_adapters(x, *weights_and_gate, residual, form, rows_per_gate, relu)
    backward = torch.ops.lion_kernels.mixture_of_adapters_backward.default
    for needs in ([True] * 6, [False, True, False, False, False, False]):
        given = (residual, x, hidden, *weights_and_gate, form, rows_per_gate, relu, needs)
        torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("gate", GATES)
def test_the_op_without_triton(gate: str, monkeypatch: pytest.MonkeyPatch, relative_error: Measure) -> None:
    """On a CPU that does not interpret, the custom ops are the plain formulas."""
    monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    monkeypatch.setattr(MODULE, "choose_backend", lambda *_: "triton")
    inputs = make_inputs(gate, 3, 8, 40)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(mixture_of_adapters, cast(inputs, torch.float64)).items():
        assert relative_error(value, expected[name]) < 1e-12, name


def test_compiles_in_one_graph(device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs("channel", 2, 8, 32)
    expected = outputs_and_gradients(reference, inputs)
    compiled = torch.compile(mixture_of_adapters, fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(compiled, cast(inputs, torch.float32, device), backend="triton").items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


def test_gradient_checkpointing(device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs("dense", 2, 8, 32)
    expected = outputs_and_gradients(reference, inputs)

    def again(**given: Tensor) -> Tensor:
        return checkpoint(lambda: mixture_of_adapters(**given, backend="triton"), use_reentrant=False)  # type: ignore

    for name, value in outputs_and_gradients(again, cast(inputs, torch.float32, device)).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_residual_stream(backend: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs("channel", 2, 8, 32)
    with torch.autocast(device.type, dtype=torch.float16):
        got = outputs_and_gradients(mixture_of_adapters, cast(inputs, torch.float32, device), backend=backend)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < OPERATOR_FP16, name
    # Nothing but the update is rounded.
    silent = {**inputs, "gate": torch.zeros_like(inputs["gate"])}
    with torch.autocast(device.type, dtype=torch.float16), torch.no_grad():
        out = mixture_of_adapters(**cast(silent, torch.float32, device), backend=backend)
    assert torch.equal(out, inputs["residual"].to(out))


def test_gate_and_residual_in_another_dtype(device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs("dense", 2, 16, 64)
    mixed = cast(inputs, torch.float16, device)
    mixed |= cast({name: inputs[name] for name in ("gate", "residual")}, torch.float32, device)
    expected = outputs_and_gradients(reference, inputs)
    got = outputs_and_gradients(mixture_of_adapters, mixed, backend="triton")
    assert got["out"].dtype == torch.float16
    assert (got["gate"].dtype, got["residual"].dtype) == (torch.float32, torch.float32)
    for name, value in got.items():
        assert relative_error(value, expected[name]) < OPERATOR_FP16, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, device: torch.device) -> None:
    inputs = cast(make_inputs("channel", 2, 8, 32, (0, 5)), torch.float32, device)
    got = outputs_and_gradients(mixture_of_adapters, inputs, backend=backend)
    assert got["out"].shape == (0, 5, 32)
    assert not got["up_weight"].any()


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_shape(data: st.DataObject, device: torch.device, relative_error: Measure) -> None:
    gate = data.draw(st.sampled_from(GATES))
    experts, rank = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    channels = data.draw(st.integers(1, 70))
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    inputs = make_inputs(gate, experts, rank, channels, shape)
    for name in data.draw(st.sets(st.sampled_from(["x", "residual"]))):
        inputs[name] = inputs[name].detach().mT.contiguous().mT.requires_grad_()
    expected = outputs_and_gradients(reference, inputs)
    got = outputs_and_gradients(mixture_of_adapters, cast(inputs, torch.float32, device), backend="triton")
    for name, value in got.items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


def test_cost_is_the_floor_of_the_published_sizes() -> None:
    """On an H200 16384 tokens of LION-FlanT5-XL take no less than 47 us, and as much backward, for the rows alone."""
    forward, backward = MODULE.cost(16384, 2048, 2, 64, torch.bfloat16)
    assert floor_seconds(forward, H200, torch.bfloat16) == pytest.approx(47e-6, rel=0.02)
    assert floor_seconds(backward, H200, torch.bfloat16) == pytest.approx(47e-6, rel=0.05)
    assert forward.flops / H200.flops_per_second["bfloat16"] == pytest.approx(22e-6, rel=0.02)
    assert backward.flops / H200.flops_per_second["bfloat16"] == pytest.approx(44e-6, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"down_weight": torch.zeros(2, 8, 31)},
            r"down_weight: expected \[E, r, D\] with D=32 \(from x\), got \[2, 8, 31\]",
        ),
        ({"down_bias": torch.zeros(2, 7)}, r"down_bias: expected \[2, 8\], got \[2, 7\]"),
        ({"up_weight": torch.zeros(2, 8, 32)}, r"up_weight: expected \[2, 32, 8\], got \[2, 8, 32\]"),
        ({"up_bias": torch.zeros(3, 32)}, r"up_bias: expected \[2, 32\], got \[3, 32\]"),
        ({"residual": torch.zeros(3, 4, 32)}, r"residual: expected \[3, 5, 32\], got \[3, 4, 32\]"),
        ({"gate": torch.zeros(4, 2, 31)}, r"gate: expected \[R, 2, 32\] with task_ids, got \[4, 2, 31\]"),
        ({"task_ids": torch.tensor([0, 1])}, r"task_ids: expected leading dimensions \[3, 5\].*got \[2\]"),
        ({"task_ids": torch.tensor([0, 4, 1])}, r"task_ids: expected values from 0 to 3, got \[4\]"),
        ({"task_ids": torch.tensor([0, -1, 1])}, r"task_ids: expected values from 0 to 3, got \[-1\]"),
        ({"task_ids": torch.zeros(3)}, "task_ids: expected integers, got torch.float32"),
        ({"task_ids": None}, r"gate: expected \[..., 2\] \(E from down_weight\), got \[4, 2, 32\]"),
        ({"expert_ids": torch.zeros(3, 5, 1).long()}, "task_ids, expert_ids: expected at most one"),
        ({"task_ids": None, "gate": torch.zeros(3, 4, 2)}, r"gate: expected leading dimensions \[3, 5\].*got \[3, 4\]"),
        (
            {"task_ids": None, "gate": torch.zeros(3, 5, 2), "expert_ids": torch.zeros(3, 5, 1).long()},
            r"expert_ids: expected \[3, 5, 2\] \(from gate\), got \[3, 5, 1\]",
        ),
        (
            {"task_ids": None, "gate": torch.zeros(3, 5, 2), "expert_ids": torch.full((3, 5, 2), 2)},
            r"expert_ids: expected values from -1 to 1, got \[2\]",
        ),
        ({"activation": "gelu"}, "activation: expected 'relu' or 'identity', got 'gelu'"),
        ({"up_bias": torch.zeros(2, 32)}, r"up_bias: expected torch.float64 \(as x\), got torch.float32"),
        ({"residual": torch.zeros(3, 5, 32, device="meta")}, r"residual: expected on cpu \(as x\), got meta"),
        ({"x": torch.tensor(1.0)}, r"x: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"x": torch.zeros(3, 5, 32).long()}, r"x: expected floating \[..., D\], got torch.int64 \[3, 5, 32\]"),
        ({"gate": torch.zeros(4, 2, 32).long()}, "gate: expected a floating dtype, got torch.int64"),
        ({"residual": torch.zeros(3, 5, 32).bool()}, "residual: expected a floating dtype, got torch.bool"),
        ({"task_ids": torch.zeros(3).to(torch.complex64)}, "task_ids: expected integers, got torch.complex64"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
        ({"backend": "triton"}, "x: expected float32, float16 or bfloat16 with backend='triton', got torch.float64"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_of_adapters(**{**make_inputs("channel", 2, 8, 32), **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")
def test_the_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(ValueError, match="x: bfloat16 is not supported by Triton's interpreter"):
        mixture_of_adapters(**cast(make_inputs("channel", 2, 8, 32), torch.bfloat16), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 320, 16384])
@pytest.mark.parametrize("gate", GATES)
def test_published_sizes_on_a_gpu(gate: str, rows: int, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(gate, 2, 64, 2048, (4, rows // 4) if rows > 1 else (1, 1))
    expected = outputs_and_gradients(reference, cast(inputs, torch.float64, device))
    given = cast(inputs, torch.bfloat16, device)
    plain = outputs_and_gradients(reference, given)
    got = outputs_and_gradients(mixture_of_adapters, given, backend="triton")
    for name, value in got.items():
        assert relative_error(value, expected[name]) < 2 * relative_error(plain[name], expected[name]) + 2**-9, name
    with torch.no_grad():
        out = mixture_of_adapters(**given, backend="triton")
    assert relative_error(out, expected["out"]) < 2 * relative_error(plain["out"], expected["out"]) + 2**-9


@pytest.mark.gpu
def test_two_hundred_times_the_same_bits_on_a_gpu(device: torch.device) -> None:
    inputs = cast(make_inputs("channel_by_row", 2, 64, 2048, (4, 417)), torch.bfloat16, device)
    first = outputs_and_gradients(mixture_of_adapters, inputs, backend="triton")
    for _ in range(200):
        for name, value in outputs_and_gradients(mixture_of_adapters, inputs, backend="triton").items():
            assert torch.equal(value, first[name]), name


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    inputs = cast(make_inputs("channel", 2, 64, 2048, (4, 1)), torch.bfloat16, device)
    with torch.no_grad():
        expected = mixture_of_adapters(**inputs, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mixture_of_adapters(**inputs, backend="triton")
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_two_to_the_31_elements_on_a_gpu(device: torch.device, relative_error: Measure) -> None:
    rows = 2**31 // 2048 + 100
    small = cast(make_inputs("dense_shared", 2, 16, 2048, (1, 100)), torch.bfloat16, device)
    x = torch.zeros(rows, 2048, dtype=torch.bfloat16, device=device)
    x[-100:] = small["x"].detach()[0]
    with torch.no_grad():
        out = mixture_of_adapters(**{**small, "x": x, "residual": None}, backend="triton")
        expected = mixture_of_adapters(**{**small, "residual": None}, backend="triton")
    assert relative_error(out[-100:], expected[0].double()) < 2**-8
