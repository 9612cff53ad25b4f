"""`lion_kernels.relative_bias_attention` against the fp64 reference: outputs, gradients, buckets, dtypes, errors."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_kernels.attention.bias import bucket_by_distance
from lion_kernels.attention.plain import dropout_mask
from lion_kernels.relative_bias_attention import cost, relative_bias_attention
from lion_reference import relative_bias_attention as reference
from lion_reference.relative_bias_attention import relative_position_bucket as reference_bucket
from tests.kernels.gradients import gradients_over
from tests.rounding import OPERATOR_FP16, OPERATOR_FP32, rounding_bound

SEED = 2**40 + 12345
NAMES = ("q", "k", "v", "bias_table")


@dataclass
class Inputs:
    """The floating arguments by name, and the options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        tensors = {name: x.detach().to(device, dtype).requires_grad_() for name, x in self.tensors.items()}
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return Inputs(tensors, options)

    def __call__(self, operator: Callable[..., Tensor], **options: Any) -> Tensor:
        return operator(**self.tensors, **{**self.options, **options})

    def results(self, operator: Callable[..., Tensor], draws: int = 1, **options: Any) -> dict[str, Tensor]:
        """The output and the gradients by argument; of more than one random gradient of the output, these stacked."""
        out = self(operator, **options)
        gradients = gradients_over(draws, out, list(self.tensors.values()))
        return {"out": out.detach(), **dict(zip(self.tensors, gradients, strict=True))}


def make_inputs(
    queries: int, keys: int, head_dim: int, *, buckets: int = 32, heads: int = 2, mask: bool = False, **options: Any
) -> Inputs:
    """fp64 inputs of two elements; with `mask`, the first element attends nothing."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    shape = (2, keys, heads, head_dim)
    tensors = {
        "q": randn(2, queries, heads, head_dim) * head_dim**-0.5,
        "k": randn(*shape),
        "v": randn(*shape),
        "bias_table": randn(buckets, heads),
    }
    if mask:
        options["key_padding_mask"] = (torch.rand(2, keys, generator=generator) > 0.3) & torch.tensor([[False], [True]])
    return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, options)


DECODER: dict[str, Any] = {"bidirectional": False, "causal": True}
CASES = {
    "two keys": make_inputs(2, 2, 8),
    "encoder": make_inputs(97, 97, 64, heads=1),
    "beyond the reach": make_inputs(50, 193, 16, heads=1, max_distance=20),
    "encoder and mask": make_inputs(70, 70, 40, mask=True, buckets=10, max_distance=9),
    "decoder": make_inputs(65, 65, 24, **DECODER),
    "decoder and mask": make_inputs(70, 100, 88, mask=True, max_distance=30, **DECODER),
    "causal with both series": make_inputs(33, 33, 16, causal=True, max_distance=12, buckets=16),
    "one step of decoding": make_inputs(1, 417, 64, **DECODER),
    "a few steps of decoding": make_inputs(17, 257, 80, mask=True, **DECODER),
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: str, backend: str, dropout_p: float, device, relative_error) -> None:
    inputs = CASES[case]
    batch, queries, heads, _ = inputs.tensors["q"].shape
    keep = dropout_mask(batch, heads, queries, inputs.tensors["k"].shape[1], dropout_p, SEED).double()
    expected = inputs.results(reference, dropout_mask=keep)
    got = inputs.to(device, torch.float32).results(
        relative_bias_attention, dropout_p=dropout_p, seed=SEED, backend=backend
    )
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", ["encoder", "decoder and mask"])
def test_fp16_is_no_worse_than_the_plain_formula(case: str, backend: str, device, relative_error) -> None:
    inputs = CASES[case]
    expected = inputs.results(reference)
    plain = inputs.to(device, torch.float16).results(reference)
    for name, value in inputs.to(device, torch.float16).results(relative_bias_attention, backend=backend).items():
        assert value.dtype == torch.float16
        assert relative_error(value, expected[name]) < rounding_bound(plain[name], expected[name]), name


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 127), (64, 1000), (10, 9), (4, 2), (33, 50)])
def test_buckets_are_the_reference_s(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    """At every distance, and beyond max_distance those at max_distance."""
    distance = torch.arange(-10 * max_distance, 10 * max_distance + 1)
    expected = reference_bucket(
        distance, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    table = bucket_by_distance(num_buckets, max_distance, bidirectional, torch.device("cpu"))
    assert table.shape == (2 * max_distance + 1,)
    assert torch.equal(table[distance.clamp(-max_distance, max_distance) + max_distance], expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_query_that_attends_nothing_gives_zeros(backend: str, device) -> None:
    """Of the first element all queries, of the second those before the first key that is not padding."""
    inputs = make_inputs(9, 9, 16, mask=True, **DECODER).to(device, torch.float32)
    inputs.options["key_padding_mask"][1] = torch.arange(9) >= 4
    out = inputs(relative_bias_attention, backend=backend)
    assert (out[0] == 0).all()
    assert (out[1, :4] == 0).all()
    assert (out[1, 4:] != 0).all()
    for gradient in torch.autograd.grad(out.square().sum() + out.sum(), list(inputs.tensors.values())):
        assert gradient.isfinite().all()


def test_the_cache_s_steps_are_the_sequence(device, relative_error) -> None:
    inputs = CASES["decoder"].to(device, torch.float32)
    tensors = {name: x.detach() for name, x in inputs.tensors.items()}
    whole = inputs(relative_bias_attention, backend="triton")
    for position in (0, 1, 50, 64):
        step = {
            "q": tensors["q"][:, position : position + 1],
            "k": tensors["k"][:, : position + 1],
            "v": tensors["v"][:, : position + 1],
            "bias_table": tensors["bias_table"],
        }
        out = relative_bias_attention(**step, **DECODER, backend="triton")
        assert relative_error(out, whole[:, position : position + 1]) < OPERATOR_FP32


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_frozen_table_costs_no_gradient(backend: str, device, relative_error) -> None:
    inputs = make_inputs(20, 20, 16)
    expected = inputs.results(reference)
    leaves = inputs.to(device, torch.float32)
    leaves.tensors["bias_table"].requires_grad_(False)
    out = leaves(relative_bias_attention, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    gradients = torch.autograd.grad(out, [leaves.tensors[name] for name in "qkv"], weights)
    for name, gradient in zip("qkv", gradients, strict=True):
        assert relative_error(gradient, expected[name]) < OPERATOR_FP32


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_table_of_another_dtype(backend: str, device, relative_error) -> None:
    inputs = make_inputs(20, 20, 16)
    expected = inputs.results(reference)
    half = inputs.to(device, torch.float16)
    half.tensors["bias_table"] = inputs.tensors["bias_table"].detach().to(device, torch.float32).requires_grad_()
    for name, value in half.results(relative_bias_attention, backend=backend).items():
        assert value.dtype == (torch.float32 if name == "bias_table" else torch.float16)
        assert relative_error(value, expected[name]) < OPERATOR_FP16, name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_reads_a_packed_projection(backend: str, device, relative_error) -> None:
    packed = torch.randn(2, 19, 3, 2, 24, dtype=torch.float64, requires_grad=True)
    table = torch.randn(32, 2, dtype=torch.float64)
    q, k, v = packed.unbind(2)
    (expected,) = torch.autograd.grad(reference(q, k, v, table).square().sum(), packed)
    leaf = packed.detach().float().to(device).requires_grad_()
    q, k, v = leaf.unbind(2)
    out = relative_bias_attention(q, k, v, table.float().to(device), backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    assert relative_error(gradient, expected) < OPERATOR_FP32


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dropout_follows_the_seed_and_the_generator(backend: str, device) -> None:
    inputs = make_inputs(9, 9, 16).to(device, torch.float32)

    def run(**options: Any) -> Tensor:
        return inputs(relative_bias_attention, dropout_p=0.5, backend=backend, **options)

    assert torch.equal(run(seed=3), run(seed=torch.tensor(3, device=device)))
    assert not torch.equal(run(seed=3), run(seed=4))
    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_a_seed_on_the_device_gives_the_same_gradients(device) -> None:
    """The table's too, whose kernel is its own."""
    inputs = make_inputs(33, 33, 16, **DECODER).to(device, torch.float32)
    expected, got = (
        inputs.results(relative_bias_attention, dropout_p=0.5, seed=seed, backend="triton")
        for seed in (SEED, torch.tensor(SEED, device=device))
    )
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_same_bits_every_time(device) -> None:
    inputs = make_inputs(40, 50, 24, mask=True, max_distance=30, **DECODER).to(device, torch.float32)
    options = {"dropout_p": 0.2, "seed": 1, "backend": "triton"}
    first, second = (inputs.results(relative_bias_attention, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_without_gradients_it_is_the_same(device) -> None:
    inputs = CASES["encoder and mask"].to(device, torch.float32)
    with torch.no_grad():
        out = inputs(relative_bias_attention, backend="triton")
    assert torch.equal(out, inputs(relative_bias_attention, backend="triton"))


@pytest.mark.parametrize("learn_bias", [True, False])
def test_opcheck(learn_bias: bool, device) -> None:
    inputs = make_inputs(3, 5, 8, heads=1, mask=True).to(device, torch.float32)
    tensors = (*inputs.tensors.values(), inputs.options["key_padding_mask"], torch.tensor(5, device=device))
    inputs.tensors["bias_table"].requires_grad_(learn_bias)
    options = (False, 64, True, 0.1)  # bidirectional, max_distance, causal, dropout_p
    forward = torch.ops.lion_kernels.relative_bias_attention.default
    torch.library.opcheck(forward, (*tensors, *options))
    with torch.no_grad():
        out, lse = forward(*tensors, *options)
        torch.library.opcheck(
            torch.ops.lion_kernels.relative_bias_attention_backward.default,
            (out, *tensors, out, lse, *options, [True, learn_bias, True, learn_bias]),
        )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_in_one_graph(backend: str, device) -> None:
    inputs = make_inputs(9, 20, 16, mask=True, **DECODER).to(device, torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, mask: Tensor) -> Tensor:
        out = relative_bias_attention(
            q, k, v, bias_table, key_padding_mask=mask, **DECODER, dropout_p=0.1, seed=7, backend=backend
        )
        return out.square().sum()

    leaves = list(inputs.tensors.values())
    arguments: Any = (*leaves, inputs.options["key_padding_mask"])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = (torch.autograd.grad(function(*arguments), leaves) for function in (loss, compiled))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_regenerates_the_mask(device) -> None:
    inputs = make_inputs(9, 9, 16).to(device, torch.float32)
    table = inputs.tensors["bias_table"]

    def run(table: Tensor) -> Tensor:
        return replace(inputs, tensors={**inputs.tensors, "bias_table": table})(
            relative_bias_attention, dropout_p=0.5, backend="triton"
        )

    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(run(table).square().sum(), table)
    torch.manual_seed(0)
    out = checkpoint(run, table, use_reentrant=False)
    (got,) = torch.autograd.grad(out.square().sum(), table)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend: str, device) -> None:
    inputs = make_inputs(9, 9, 16).to(device, torch.float32)
    with torch.autocast(device.type, dtype=torch.float16):
        out = inputs(relative_bias_attention, backend=backend)
    assert out.dtype == torch.float16
    for gradient in torch.autograd.grad(out.sum(), list(inputs.tensors.values())):
        assert gradient.dtype == torch.float32
    torch.testing.assert_close(out.float(), inputs(reference), atol=OPERATOR_FP16, rtol=OPERATOR_FP16)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_shape(data: st.DataObject, device, relative_error) -> None:
    draw = data.draw
    queries = draw(st.sampled_from([2, 15, 17, 33, 48, 66]))
    buckets, max_distance = draw(st.sampled_from([(32, 128), (10, 9), (8, 30)]))
    inputs = make_inputs(
        queries,
        queries + draw(st.sampled_from([0, 1, 31, 64])),
        draw(st.sampled_from([8, 40, 64, 88, 128])),
        heads=draw(st.integers(1, 2)),
        buckets=buckets,
        max_distance=max_distance,
        mask=draw(st.booleans()),
        causal=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
    )
    if "key_padding_mask" in inputs.options:
        # With one key its weight is 1 whatever q and k are: their gradients are zero, and what rounding leaves of them
        # has no relative error.
        inputs.options["key_padding_mask"][1, :2] = True
    dropout_p = draw(st.sampled_from([0.0, 0.4]))
    batch, _, heads, _ = inputs.tensors["q"].shape
    keep = dropout_mask(batch, heads, queries, inputs.tensors["k"].shape[1], dropout_p, SEED).double()
    draws = 1 if queries > 2 else 8  # of two queries and two keys the gradients are differences that may cancel
    expected = inputs.results(reference, draws, dropout_mask=keep)
    got = inputs.to(device, torch.float32)
    if draw(st.booleans()):
        got.tensors["k"] = got.tensors["k"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    options = {"dropout_p": dropout_p, "seed": SEED, "backend": "triton"}
    for name, value in got.results(relative_bias_attention, draws, **options).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


def test_cost_counts_what_is_attended() -> None:
    q = torch.empty(2, 10, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 30, 4, 64, dtype=torch.bfloat16, device="meta")
    forward, _ = cost(q, k)
    assert forward.flops == 4 * 2 * 4 * 10 * 30 * 64
    assert forward.bytes == 2 * (q.numel() + k.numel()) * 2
    causal, _ = cost(q, k, causal=True)
    assert causal.flops == 4 * 2 * 4 * sum(range(21, 31)) * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 16)}, r"q: expected \[B, L, H, Dh\], got \[2, 4, 16\]"),
        ({"k": torch.zeros(2, 3, 2, 16)}, r"k: expected \[2, 'M >= 4', 2, 16\] .*got \[2, 3, 2, 16\]"),
        ({"v": torch.zeros(2, 3, 2, 16)}, r"v: expected \[2, 4, 2, 16\] .*got \[2, 3, 2, 16\]"),
        ({"v": torch.zeros(2, 4, 2, 16).half()}, r"v: expected torch.float32 \(from q\), got torch.float16"),
        ({"k": torch.zeros(2, 4, 2, 16, device="meta")}, r"k: expected on cpu .*got meta"),
        ({"bias_table": torch.zeros(32, 3)}, r"bias_table: expected \[num_buckets, 2\] .*got \[32, 3\]"),
        ({"bias_table": torch.zeros(32, 2).long()}, "bias_table: expected a floating dtype, got torch.int64"),
        ({"bias_table": torch.zeros(3, 2)}, "bias_table: expected num_buckets >= 4, got 3"),
        ({"key_padding_mask": torch.ones(2, 3)}, r"key_padding_mask: expected \[2, 4\] .*got \[2, 3\]"),
        ({"max_distance": 8}, r"max_distance: expected more than 8 \(from bias_table\), got 8"),
        ({"dropout_p": -0.1}, "dropout_p: expected 0 <= dropout_p < 1, got -0.1"),
        ({"seed": -(2**63) - 1}, "seed: expected an int64, got -9223372036854775809"),
        ({"seed": torch.tensor(0).int()}, r"seed: expected torch.int64 \[\] on cpu, got torch.int32 \[\] on cpu"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(2, 4, 2, 16)
    with pytest.raises(ValueError, match=message):
        relative_bias_attention(**{"q": x, "k": x, "v": x, "bias_table": torch.zeros(32, 2), **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no interpreter where there is a CUDA device")
def test_the_interpreter_refuses_bf16() -> None:
    x = torch.zeros(2, 4, 2, 16)
    with pytest.raises(ValueError, match="bias_table: bfloat16 is not supported by Triton's interpreter"):
        relative_bias_attention(x, x, x, torch.zeros(32, 2, dtype=torch.bfloat16), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, DECODER], ids=["encoder", "decoder"])
def test_t5_shape_on_a_gpu(options: dict[str, Any], dtype: torch.dtype, device, relative_error) -> None:
    inputs = make_inputs(417, 417, 64, heads=8, mask=True, **options)
    expected = inputs.results(reference)
    plain = inputs.to(device, dtype).results(reference)
    got = [inputs.to(device, dtype).results(relative_bias_attention, backend="triton") for _ in range(200)]
    for name, value in got[0].items():
        assert relative_error(value, expected[name]) < 2 * relative_error(plain[name], expected[name]), name
        assert all(torch.equal(value, other[name]) for other in got[1:]), name


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_seed_at_each_replay(device) -> None:
    inputs = CASES["decoder and mask"].to(device, torch.float16)
    seed = torch.tensor(1, device=device)

    def run(seed: int | Tensor) -> Tensor:
        return inputs(relative_bias_attention, dropout_p=0.5, seed=seed, backend="triton")

    with torch.no_grad():
        expected = {number: run(number) for number in (1, 2)}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(seed)
    for number in (1, 2):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(out, expected[number])
