"""The contract of every operator: the reference's values and gradients in any layout, and PyTorch's rules for ops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lion_fast.check import cases
from lion_fast.check.cases import Case
from lion_fast.check.compare import compare, make_tensors
from lion_kernels.core.backend import interpreting
from tests.kernels.contract import (
    ATTENTION,
    CASES,
    KEEPS_DTYPES,
    LOW_RANK,
    SMALL,
    VARIANTS,
    by_case,
    by_case_and_way,
    computing,
    expect_close,
    expect_equal,
    make,
    operator_of,
    recorded,
    reference,
    results,
    run,
)
from tests.rounding import OPERATOR_FP16, OPERATOR_FP32, relative_error, rounding_bound

poisoned = pytest.mark.usefixtures("poison")
COPIES = "assemble_inputs"  # its output is a copy, so it must be bit-equal
DROPS = tuple(case for case in SMALL if case.dropout)
# From rank 64, backward computes a transposed product.
TURNED = tuple(cases.adapters(gate, (3, 5), 64, 2, 64) for gate in ("channel", "dense", "sparse"))


@poisoned
@by_case_and_way((*CASES, *SMALL, *VARIANTS), "triton", "torch", "formula", "fused")
def test_agrees_with_the_reference(case: Case, way: str, device: torch.device) -> None:
    """Compare outputs and all gradients in fp32, and outputs without gradients; unwritten memory is never read."""
    tensors = make(case, device=device)
    expected = reference(case, tensors)
    with computing(way, own_tiles=case in SMALL) as backend:
        got = run(case, tensors, backend)
        with torch.set_grad_enabled(way == "formula"):  # without gradients, no custom op is called
            out = run(case, tensors, backend)["out"]
    assert all(value.dtype == torch.float32 for value in got.values())
    expect_close(got, expected)
    expect_close({"out": out}, expected)
    if case.operator == COPIES:
        assert torch.equal(got["out"].cpu().double(), expected["out"])


@poisoned
@by_case_and_way((*SMALL, *TURNED), "triton", "torch", "fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_no_worse_than_the_plain_formula(
    case: Case, way: str, dtype: torch.dtype, device: torch.device
) -> None:
    if way != "torch" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes something else in bfloat16")
    tensors = make(case, dtype, device)
    expected, plain = reference(case, tensors), reference(case, tensors, dtype, device)
    with computing(way) as backend:
        got = run(case, tensors, backend)
    for name, value in got.items():
        assert value.dtype == dtype
        assert relative_error(value, expected[name]) < rounding_bound(plain[name], expected[name]), name


# Operator, its tensors in fp16 (the others are in fp32), and the tensor whose dtype the output has.
MIXED = [
    ("mixture_of_adapters", ("x", "down_weight", "down_bias", "up_weight", "up_bias"), "x"),
    ("mixture_of_lora_linear", ("x", "weight", "bias", "lora_a", "lora_b"), "x"),
    ("relative_bias_attention", ("q", "k", "v"), "q"),
    ("residual_layer_norm", ("x",), "residual"),
    ("residual_layer_norm", ("x", "residual"), "residual"),
    ("rms_norm", ("x",), "weight"),
    ("rms_norm", ("weight",), "weight"),
    ("assemble_inputs", ("prefix",), "embedding"),
    ("assemble_inputs", ("embedding",), "embedding"),
]


@poisoned
@pytest.mark.parametrize(
    ("operator", "half", "as_out", "backend"),
    [
        pytest.param(operator, half, as_out, backend, id=f"{operator}: {'+'.join(half)}-{backend}")
        for operator, half, as_out in MIXED
        for backend in ("triton", "torch")
    ],
)
def test_mixed_dtypes(operator: str, half: tuple[str, ...], as_out: str, backend: str, device: torch.device) -> None:
    """Dtypes are mixed under autocast, or if a part of a frozen half-precision model is trained in fp32."""
    for case in (case for case in SMALL if case.operator == operator):
        tensors = make(case, device=device)
        tensors |= {name: tensors[name].detach().half().requires_grad_() for name in half if name in tensors}
        got, expected = run(case, tensors, backend), reference(case, tensors)
        for name, value in got.items():
            assert value.dtype == tensors[as_out if name == "out" else name].dtype, name
            exact = value.dtype == got["out"].dtype == torch.float32
            assert relative_error(value, expected[name]) < (OPERATOR_FP32 if exact else OPERATOR_FP16), name
        if backend == "triton":
            for op, arguments in recorded(case, tensors, backend):
                torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@by_case(SMALL)
def test_pytorch_keeps_fp64_in_fp64(case: Case) -> None:
    tensors = make(case, torch.float64)
    got = run(case, tensors, "torch")
    assert all(value.dtype == torch.float64 for value in got.values())
    expect_close(got, reference(case, tensors), 1e-12)


@by_case_and_way(tuple(case for case in SMALL if case.operator in LOW_RANK), "formula")
def test_low_rank_formulas_in_fp64(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other operators' formulas store statistics in fp32."""
    monkeypatch.setattr("lion_kernels.low_rank.launch.why_unsupported", lambda x: None)
    tensors = make(case, torch.float64)
    with computing(way) as backend:
        expect_close(run(case, tensors, backend), reference(case, tensors), 1e-12)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "half of a packed last dimension": lambda x: torch.cat([x, torch.ones_like(x)], -1)[..., : x.shape[-1]],
    "every other channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: _exchanged(x, min(1, x.dim() - 2), -1) if x.dim() > 1 else x,
    "first dimensions exchanged": lambda x: _exchanged(x, 0, -2) if x.dim() > 2 else x,
    "rows of an odd length": lambda x: F.pad(x, (3, 2))[..., 3:-2],
    "expanded": lambda x: x[:1].expand_as(x),
}


def _exchanged(x: Tensor, one: int, other: int) -> Tensor:
    return x.transpose(one, other).contiguous().transpose(one, other)


@poisoned
@by_case_and_way(SMALL, "triton", "torch", "fused")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(case: Case, way: str, layout: str, device: torch.device) -> None:
    """Change the strides of every floating tensor and every mask; expanded tensors have equal rows."""
    view, tensors = LAYOUTS[layout], make(case, device=device)
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = view(value.detach()).requires_grad_()
        elif layout == "every other channel":
            tensors[name] = view(value)
    assert not all(value.is_contiguous() for value in tensors.values())
    with computing(way) as backend:
        expect_close(run(case, tensors, backend), reference(case, tensors))


@poisoned
@by_case_and_way(SMALL, "triton", "fused")
@pytest.mark.parametrize("layout", ["one value", "every other channel", "transposed"])
def test_strides_of_the_gradient(case: Case, way: str, layout: str, device: torch.device) -> None:
    tensors = make(case, device=device)
    shape = operator_of(case)(**case.arguments(tensors)).shape
    values = torch.randn(*reversed(shape), 2, generator=torch.Generator().manual_seed(2)).to(device)
    grad = {
        "one value": torch.tensor(0.5, device=device).expand(shape),
        "every other channel": values.view(*shape, 2)[..., 0],
        "transposed": values[..., 0].contiguous().permute(*reversed(range(len(shape)))),
    }[layout]
    assert not grad.is_contiguous()
    with computing(way) as backend:
        expect_close(run(case, tensors, backend, grad), reference(case, tensors, grad=grad))


@poisoned
@by_case_and_way(SMALL, "triton", "formula", "fused")
def test_each_gradient_alone(case: Case, way: str, device: torch.device) -> None:
    """A gradient computed alone has the same bits as with all others; frozen tensors have none."""
    with computing(way) as backend:
        whole = run(case, make(case, device=device), backend)
        for wanted in whole.keys() - {"out"}:
            tensors = make(case, device=device)
            for name, value in tensors.items():
                value.requires_grad_(name == wanted)
            expect_equal(run(case, tensors, backend), {name: whole[name] for name in ("out", wanted)})


@by_case_and_way(SMALL, "triton", "fused")
def test_the_same_call_gives_the_same_bits(case: Case, way: str, device: torch.device) -> None:
    """Repeat the call, and call without gradients, when nothing is saved for backward."""
    tensors = make(case, device=device)
    with computing(way) as backend:
        first = run(case, tensors, backend)
        expect_equal(run(case, tensors, backend), first)
        with torch.no_grad():
            out = run(case, tensors, backend)["out"]
    assert out.grad_fn is None
    assert torch.equal(out, first["out"])


@poisoned
@by_case_and_way(SMALL, "triton", "formula", "fused")
def test_opcheck(case: Case, way: str, device: torch.device) -> None:
    """Check the custom ops as the operator calls them, for autograd and the compiler: forward, and backward for all
    gradients and for one alone.

    Interpreted kernels differ from the formulas only in what they compute, so the formulas alone are checked with
    autograd and the compiler.
    """
    own = {"test_utils": ("test_schema", "test_faketensor")} if interpreting() and way != "formula" else {}
    with computing(way) as backend:
        tensors = make(case, device=device)
        calls = recorded(case, tensors, backend)
        assert len(calls) == 2
        for name, value in tensors.items():
            value.requires_grad_(name == next(iter(tensors)))
        calls += recorded(case, tensors, backend)[1:]
        for op, arguments in calls:
            forward = not op.name().endswith("_backward")
            torch.library.opcheck(op, tuple(_leaf(value, forward) for value in arguments), **own)


def _leaf(value: Any, needs_gradient: bool) -> Any:
    if isinstance(value, list):
        return [_leaf(one, needs_gradient) for one in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(needs_gradient and value.is_floating_point())


@poisoned
@by_case_and_way(SMALL, "triton", "torch", "fused")
def test_compiles_in_one_graph(case: Case, way: str, device: torch.device) -> None:
    tensors = make(case, device=device)
    torch.compiler.reset()  # other tests' graphs count towards a limit
    compiled = torch.compile(operator_of(case), fullgraph=True, backend="aot_eager")
    with computing(way) as backend:
        expected = run(case, tensors, backend)
        expect_close(results(compiled, tensors, case.arguments(tensors), backend=backend), expected)
        with torch.no_grad():
            expect_close(results(compiled, tensors, case.arguments(tensors), backend=backend), expected)
            if case.dropout:
                arguments = case.arguments(tensors) | {"dropout_p": 0.5, "seed": None}
                assert not torch.equal(*(compiled(**arguments, backend=backend) for _ in range(2)))


@by_case_and_way(SMALL, "triton", "torch", "fused")
def test_activation_checkpointing(case: Case, way: str, device: torch.device) -> None:
    """Results are bit-equal to those without checkpointing; recomputation drops the same values."""
    tensors = make(case, device=device)
    arguments = case.arguments(tensors) | ({"dropout_p": 0.5, "seed": None} if case.dropout else {})

    def checkpointed(**given: Any) -> Any:
        return checkpoint(operator_of(case), **given, use_reentrant=False)

    with computing(way) as backend:
        found = []
        for operator in (operator_of(case), checkpointed):
            torch.manual_seed(0)
            found.append(results(operator, tensors, arguments, backend=backend))
    expect_equal(*found)


@by_case_and_way(SMALL, "triton", "torch", "fused")
def test_autocast(case: Case, way: str, device: torch.device) -> None:
    """Row operators ignore autocast; the others compute in its dtype, which attention also returns."""
    tensors = make(case, device=device)
    if case.operator in KEEPS_DTYPES and case.operator != "gated_gelu":  # its two inputs have the same dtype
        first = next(iter(tensors))
        tensors[first] = tensors[first].detach().half().requires_grad_()
    with computing(way) as backend:
        expected = run(case, tensors, backend)
        with torch.autocast(device.type, dtype=torch.float16):
            got = run(case, tensors, backend)
    if case.operator in KEEPS_DTYPES:
        expect_equal(got, expected)
        assert {name: value.dtype for name, value in got.items()} == {n: value.dtype for n, value in expected.items()}
    else:
        expect_close({"out": got["out"]} if case.operator in ATTENTION else got, expected, OPERATOR_FP16)
        assert got.pop("out").dtype == (torch.float16 if case.operator in ATTENTION else torch.float32)
        assert all(value.dtype == torch.float32 for value in got.values())


SMALL_WITHOUT_KEYS = (
    cases.maps_attention(3, (0,), 16),
    cases.maps_attention(3, (0, 5), 16, gate=True),
    cases.maps_attention(3, (5, 0), 16, mask=True),
)
EMPTY = (
    cases.adapters("channel", (0, 5), 32, 2, 8),
    cases.lora("dense", (0, 5), 32, 40, 2, 8),
    cases.layer_norm((0,), 64, dropout=True),
    cases.rms_norm((0, 3), 64),
    cases.gated_gelu((0, 3), 64),
    cases.layer_norm((3,), 0),
    cases.rms_norm((2, 3), 0),
    cases.gated_gelu((3,), 0),
    cases.assemble(2, 3, 4, 0, 9),
    cases.maps_attention(0, (4,), 16),
    cases.maps_attention(3, (4, 5), 16, heads=0, gate=True),
    cases.maps_attention(3, (0,), 16, batch=0),
    cases.biased_attention(0, 3, 16),
    cases.biased_attention(3, 3, 16, heads=0, decoder=True),
    cases.biased_attention(0, 0, 16, mask=True),
)


@poisoned
@by_case_and_way(EMPTY, "triton", "torch")
def test_no_rows(case: Case, way: str, device: torch.device) -> None:
    """Without rows, channels, queries or heads, the gradients of parameters are zero."""
    tensors = make(case, device=device)
    got, expected = run(case, tensors, way), reference(case, tensors)
    assert got["out"].numel() == 0
    expect_equal({name: value.cpu().double() for name, value in got.items()}, expected)


@poisoned
@by_case_and_way(SMALL_WITHOUT_KEYS, "triton", "torch")
def test_no_keys(case: Case, way: str, device: torch.device) -> None:
    """A map without keys adds nothing; the other maps have their gradients."""
    tensors = make(case, device=device)
    expect_close(run(case, tensors, way), reference(case, tensors))


@by_case_and_way((*SMALL, *VARIANTS), "triton", "torch", "fused")
def test_shapes_of_fake_tensors(case: Case, way: str, device: torch.device) -> None:
    """Fake tensors give the shapes, dtypes and strides of the real output and gradients."""
    tensors = make(case, device=device)
    with computing(way) as backend:
        expected = run(case, tensors, backend)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {name: mode.from_tensor(value) for name, value in tensors.items()}
            got = run(case, fake, backend, mode.from_tensor(torch.ones_like(expected["out"])))
    for name, value in got.items():
        assert type(value) is not Tensor
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name
        assert value.squeeze().stride() == expected[name].squeeze().stride(), name


@by_case_and_way(DROPS, "triton", "torch")
def test_dropout_follows_the_seed_and_the_generator(case: Case, way: str, device: torch.device) -> None:
    """A seed tensor gives the same bits as the number, in backward too, and is read at each call."""
    tensors, seed = make(case, device=device), torch.zeros((), dtype=torch.int64, device=device)

    def out(seed: int | Tensor | None) -> Tensor:
        return operator_of(case)(**case.arguments(tensors) | {"dropout_p": 0.5, "seed": seed}, backend=way)

    with computing(way):
        for number in (2**40 + 5, -3):
            seed.fill_(number)
            expect_equal(run(case, tensors, way, seed=seed), run(case, tensors, way, seed=number))
        assert not any(torch.equal(out(5), out(other)) for other in (6, 5 + 2**32))
        torch.manual_seed(0)
        first, second = out(None), out(None)
        torch.manual_seed(0)
        assert torch.equal(out(None), first)
        assert not torch.equal(first, second)


@by_case(DROPS)
def test_a_seed_is_not_overwritten_before_backward(case: Case, device: torch.device) -> None:
    tensors, seed = make(case, device=device), torch.tensor(1, device=device)
    out = operator_of(case)(**case.arguments(tensors) | {"seed": seed}, backend="triton")
    seed.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _leading(draw: Any, least: int) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 4), min_size=least, max_size=3), label="leading dimensions"))


GATES = ("channel", "channel by row", "dense", "dense by sequence", "dense for all", "sparse")
ANY: dict[str, Callable[[Any], Case]] = {
    "mixture_of_adapters": lambda draw: cases.adapters(
        draw(st.sampled_from(GATES)), _leading(draw, 1), *(draw(st.integers(1, most)) for most in (70, 5, 20))
    ),
    "mixture_of_lora_linear": lambda draw: cases.lora(
        draw(st.sampled_from(GATES)), _leading(draw, 1), *(draw(st.integers(1, most)) for most in (70, 70, 5, 20))
    ),
    "multi_scale_attention": lambda draw: cases.maps_attention(
        draw(st.sampled_from([15, 17, 33, 48, 66])),
        tuple(draw(st.lists(st.sampled_from([2, 16, 17, 31, 33, 65]), min_size=1, max_size=3))),
        draw(st.sampled_from(range(8, 129, 8))),
        **{name: draw(st.booleans(), label=name) for name in ("mask", "gate", "dropout")},
    ),
    "relative_bias_attention": lambda draw: cases.biased_attention(
        queries := draw(st.sampled_from([15, 17, 33, 48, 66])),
        queries + draw(st.sampled_from([0, 1, 31, 64])),
        draw(st.sampled_from([8, 40, 64, 88, 128])),
        buckets=(bias := draw(st.sampled_from([(32, 128), (10, 9), (8, 30)])))[0],
        max_distance=bias[1],
        bidirectional=draw(st.booleans()),
        **{name: draw(st.booleans(), label=name) for name in ("mask", "decoder", "dropout")},
    ),
    "residual_layer_norm": lambda draw: cases.layer_norm(
        _leading(draw, 0), draw(st.integers(8, 150)), x_bias=draw(st.booleans()), dropout=draw(st.booleans())
    ),
    "rms_norm": lambda draw: cases.rms_norm(_leading(draw, 0), draw(st.integers(4, 150))),
    "gated_gelu": lambda draw: cases.gated_gelu(_leading(draw, 0), draw(st.integers(1, 150))),
    "assemble_inputs": lambda draw: cases.assemble(
        *(draw(st.integers(1, 6)) for _ in range(3)), draw(st.integers(1, 150)), draw(st.integers(1, 50))
    ),
}


@pytest.mark.parametrize("operator", ANY)
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_shape(operator: str, data: st.DataObject, device: torch.device) -> None:
    case = ANY[operator](data.draw)
    layout = data.draw(st.sampled_from([None, *LAYOUTS]), label="layout")
    tensors = make(case, device=device)
    if layout not in (None, "expanded"):
        tensors |= {
            name: LAYOUTS[layout](value.detach()).requires_grad_()
            for name, value in tensors.items()
            if value.is_floating_point()
        }
    # With another gradient, the gate's few gradients may cancel, and their relative error is then meaningless.
    grad = reference(case, tensors)["out"].float().to(device) if "scale_gate" in tensors else None
    with computing("triton") as backend:
        expect_close(run(case, tensors, backend, grad), reference(case, tensors, grad=grad))


_ROWS = ((1, 1), (4, 80), (4, 4096))
# The published models' sizes; the fp64 references run on the GPU.
MODELS: tuple[Case, ...] = (
    *(cases.adapters(gate, shape, 2048, 2, 64, timed=True) for gate in GATES for shape in _ROWS),
    *(cases.lora(gate, shape, 2048, 5120, 4, 16, timed=True) for gate in GATES for shape in _ROWS),
    cases.maps_attention(257, (257,), 88, heads=16, timed=True),
    cases.maps_attention(257, (257, 257), 88, batch=3, heads=16, mask=True, gate=True, timed=True),
    cases.maps_attention(257, (257, 257), 88, batch=3, heads=16, mask=True, gate=True, dropout=True, timed=True),
    cases.biased_attention(417, 417, 64, heads=8, mask=True, timed=True),
    cases.biased_attention(417, 417, 64, heads=8, mask=True, decoder=True, timed=True),
    cases.biased_attention(70, 100, 88, mask=True, decoder=True, dropout=True, timed=True),
    *(cases.layer_norm(shape, 1408, dropout=True, timed=True) for shape in ((1,), (16, 257))),
    cases.layer_norm((1000,), 4096, timed=True),
    *(cases.rms_norm(shape, 2048, timed=True) for shape in ((1,), (16, 1024), (4113,))),
    cases.rms_norm((1000,), 4096, timed=True),
    *(cases.gated_gelu(shape, 5120, timed=True) for shape in ((1,), (16, 1024), (4113,))),
    cases.assemble(16, 289, 417, 2048, 50, timed=True),
)
ONE_OF_EACH_MODEL = tuple({case.operator: case for case in MODELS}.values())


def _holds(case: Case, dtype: torch.dtype, way: str, device: torch.device, repeats: int) -> None:
    """Compare as `lion-fast check` does, which also detects kernels that read unwritten memory."""
    with computing(way):
        outcome = compare(case, dtype, device, repeats=repeats)
    assert outcome.kernels
    assert not outcome.problems


@pytest.mark.gpu
@by_case_and_way(MODELS, "triton", "fused")
def test_bfloat16_on_a_gpu(case: Case, way: str, device: torch.device) -> None:
    _holds(case, torch.bfloat16, way, device, repeats=1)


@pytest.mark.gpu
@by_case(tuple(case for case in MODELS if case.operator in ATTENTION))
def test_fp16_attention_on_a_gpu(case: Case, device: torch.device) -> None:
    _holds(case, torch.float16, "triton", device, repeats=1)


@pytest.mark.gpu
@by_case(tuple(case for case in MODELS if case.dropout))
def test_a_cuda_graph_draws_a_mask_at_each_replay(case: Case, device: torch.device) -> None:
    """The mask comes from the generator, or from the current value of the seed tensor."""
    given = case.arguments(make_tensors(case, torch.bfloat16, device)) | {"dropout_p": 0.5}
    seed = torch.tensor(1, device=device)

    def out(seed: int | Tensor | None) -> Tensor:
        return operator_of(case)(**given | {"seed": seed}, backend="triton")

    with torch.no_grad():
        expected = {number: out(number) for number in (1, 2)}
        out(None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn, fixed = out(None), out(seed)
    draws = []
    for number in (1, 2):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(fixed, expected[number])
        draws.append(drawn.clone())
    assert not torch.equal(*draws)


@pytest.mark.gpu
@by_case_and_way(ONE_OF_EACH_MODEL, "triton", "fused")
def test_two_hundred_calls_give_the_same_bits(case: Case, way: str, device: torch.device) -> None:
    _holds(case, torch.bfloat16, way, device, repeats=200)


@pytest.mark.gpu
@by_case_and_way(ONE_OF_EACH_MODEL, "triton", "fused")
def test_a_cuda_graph_gives_the_same_bits(case: Case, way: str, device: torch.device) -> None:
    arguments = case.arguments(make_tensors(case, torch.bfloat16, device))
    with computing(way) as backend, torch.no_grad():
        expected = operator_of(case)(**arguments, backend=backend)  # compiles the kernels, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = operator_of(case)(**arguments, backend=backend)
    for _ in range(200):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
