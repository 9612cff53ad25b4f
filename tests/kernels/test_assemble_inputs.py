"""`lion_kernels.assemble_inputs` against the reference, which copies: the same bits."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_kernels.assemble_inputs import assemble_inputs, cost, launch_backward
from lion_reference import assemble_inputs as reference
from tests.kernels.gradients import Measure, cast, gradient_of, outputs_and_gradients
from tests.rounding import OPERATOR_FP32

pytestmark = pytest.mark.usefixtures("poison")
MODULE = sys.modules["lion_kernels.assemble_inputs"]
VOCABULARY = 50
BEYOND = VOCABULARY + 7  # a soft prompt's id that the table does not have
FLOATING = ("prefix", "embedding", "soft_prompt")


def make_inputs(
    batch: int,
    prefix_length: int,
    length: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    soft_prompt_id: int = BEYOND,
) -> dict[str, Any]:
    """Ids that repeat, a soft prompt in every third place of every second sequence."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "prefix": (batch, prefix_length, channels),
        "embedding": (VOCABULARY, channels),
        "soft_prompt": (channels,),
    }
    inputs: dict[str, Any] = {
        name: torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for name, size in sizes.items()
    }
    input_ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    input_ids[::2, ::3] = soft_prompt_id
    return {**inputs, "input_ids": input_ids.to(device), "soft_prompt_id": soft_prompt_id}


def exact(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The reference on the CPU, from the values as `inputs` holds them, with a table that has the soft prompt's id."""
    given = cast(inputs, dtype, "cpu")
    embedding = given["embedding"]
    longer = torch.cat([embedding, embedding.new_full((BEYOND + 1 - VOCABULARY, embedding.shape[1]), float("nan"))])

    def extended(embedding: Tensor, **rest: Any) -> Tensor:
        return reference(embedding=torch.cat([embedding, longer[VOCABULARY:].detach()]), **rest)

    return outputs_and_gradients(extended, {**given, "input_ids": given["input_ids"].long()})


SIZES = [(1, 1, 1, 64), (3, 5, 17, 176), (2, 32, 9, 1408), (2, 3, 4, 4096), (5, 7, 3, 100), (2, 0, 65, 48)]


@pytest.mark.parametrize("soft_prompt_id", [BEYOND, 3, 1])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("sizes", SIZES)
def test_agrees_with_the_reference(
    sizes: tuple[int, ...], backend: str, soft_prompt_id: int, device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(*sizes, device=device, soft_prompt_id=soft_prompt_id)
    expected = exact(inputs)
    got = outputs_and_gradients(assemble_inputs, inputs, backend=backend)
    assert torch.equal(got["out"].cpu().double(), expected["out"])
    for name in FLOATING:
        assert got[name].dtype == torch.float32
        if sizes[1] or name != "prefix":
            assert relative_error(got[name], expected[name]) < OPERATOR_FP32, name


def test_half_precision_is_no_worse_than_the_plain_formula(device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(4, 5, 37, 176, torch.float16, device)
    expected, plain = exact(inputs), exact(inputs, torch.float16)
    got = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    assert torch.equal(got["out"].cpu().double(), expected["out"])
    for name in FLOATING:
        assert got[name].dtype == torch.float16
        assert relative_error(got[name], expected[name]) <= 2 * relative_error(plain[name], expected[name]), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_embedding_decides_the_dtype(backend: str, device: torch.device) -> None:
    """A soft prompt trained in fp32 before a frozen language model in half precision."""
    inputs = make_inputs(2, 3, 7, 48, device=device)
    inputs["embedding"] = inputs["embedding"].detach().half().requires_grad_()
    expected = {**inputs, **{name: inputs[name].detach().half().requires_grad_() for name in FLOATING}}
    got = outputs_and_gradients(assemble_inputs, inputs, backend=backend)
    assert got["out"].dtype == got["embedding"].dtype == torch.float16
    assert got["prefix"].dtype == got["soft_prompt"].dtype == torch.float32
    for name, value in outputs_and_gradients(assemble_inputs, expected, backend="torch").items():
        torch.testing.assert_close(got[name].half(), value)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_strides(id_dtype: torch.dtype, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(6, 10, 14, 96, device=device)
    inputs |= {
        "prefix": inputs["prefix"].detach()[::2, 1::3, 48:].requires_grad_(),
        "input_ids": inputs["input_ids"].to(id_dtype)[1::2, ::2],
        "embedding": inputs["embedding"].detach()[:, 48:].requires_grad_(),
        "soft_prompt": inputs["soft_prompt"].detach()[::2].requires_grad_(),
    }
    for transposed in (False, True):
        if transposed:
            inputs["prefix"] = inputs["prefix"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            table = inputs["embedding"].detach().t().contiguous().t()
            inputs["embedding"] = table.requires_grad_()
        expected = exact(inputs)
        got = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
        assert torch.equal(got["out"].cpu().double(), expected["out"])
        for name in FLOATING:
            assert relative_error(got[name], expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("reduce", [Tensor.sum, lambda out: out.transpose(0, 2)[::3].square().mean()])
def test_strides_of_the_gradient(
    reduce: Callable[[Tensor], Tensor], device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(3, 5, 17, 48, device=device)
    other = {name: value.detach().requires_grad_() if name in FLOATING else value for name, value in inputs.items()}
    got = torch.autograd.grad(reduce(assemble_inputs(**inputs, backend="triton")), [inputs[n] for n in FLOATING])
    expected = torch.autograd.grad(reduce(assemble_inputs(**other, backend="torch")), [other[n] for n in FLOATING])
    for one, wanted in zip(got, expected, strict=True):
        assert relative_error(one, wanted) < OPERATOR_FP32


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("trained", [*((name,) for name in FLOATING), ("prefix", "soft_prompt")])
def test_what_is_frozen_has_no_gradient(
    trained: tuple[str, ...], backend: str, device: torch.device, relative_error: Measure
) -> None:
    inputs = make_inputs(3, 5, 17, 48, device=device)
    expected = exact(inputs)
    for name in FLOATING:
        inputs[name].requires_grad_(name in trained)
    out = assemble_inputs(**inputs, backend=backend)
    out.backward(gradient_of(out))
    for name in FLOATING:
        assert (inputs[name].grad is not None) == (name in trained)
        if name in trained:
            assert relative_error(inputs[name].grad, expected[name]) < OPERATOR_FP32, name


def test_without_gradients_the_result_is_the_same(device: torch.device) -> None:
    inputs = make_inputs(3, 5, 17, 48, device=device)
    trained = assemble_inputs(**inputs, backend="triton")
    with torch.no_grad():
        out = assemble_inputs(**inputs, backend="triton")
    assert out.grad_fn is None
    assert torch.equal(out, trained)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 64), (2, 3, 0, 64), (2, 0, 0, 64)])
def test_nothing_to_do(sizes: tuple[int, ...], device: torch.device) -> None:
    inputs = make_inputs(*sizes, device=device)
    got = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    assert got["out"].shape == (sizes[0], sizes[1] + sizes[2], 64)
    assert torch.equal(got["soft_prompt"], torch.zeros_like(got["soft_prompt"]))
    assert torch.equal(got["embedding"], torch.zeros_like(got["embedding"]))


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs(7, 5, 257, 48, device=device)
    first = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    again = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_unknown_id_where_nobody_can_wait(device: torch.device) -> None:
    """The operator itself, as on a GPU or compiled: NaN in place of what lies beyond the table, no gradient."""
    inputs = make_inputs(2, 3, 5, 48, device=device)
    good = assemble_inputs(**inputs, backend="torch")
    inputs["input_ids"][1, 1], inputs["input_ids"][1, 3] = VOCABULARY, -1
    out = torch.ops.lion_kernels.assemble_inputs(*(inputs[n] for n in ("prefix", "input_ids", *FLOATING[1:])), BEYOND)
    unknown = torch.zeros(2, 8, dtype=torch.bool, device=device)
    unknown[1, 4] = unknown[1, 6] = True
    assert out[unknown].isnan().all()
    assert torch.equal(out[~unknown], good[~unknown])
    (dembedding,) = torch.autograd.grad(out[:, 3:].nan_to_num().sum(), inputs["embedding"])
    ids = inputs["input_ids"][(inputs["input_ids"] >= 0) & (inputs["input_ids"] < VOCABULARY)]
    assert torch.equal(dembedding[:, 0].long(), ids.bincount(minlength=VOCABULARY))


@pytest.mark.parametrize("interpreted", [True, False])
def test_opcheck(interpreted: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' contracts with autograd and the compiler, by the kernels and by PyTorch on the CPU."""
    if not interpreted:
        device = torch.device("cpu")
        monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    inputs = make_inputs(2, 3, 5, 48, device=device)
    arguments = (*(inputs[name] for name in ("prefix", "input_ids", "embedding", "soft_prompt")), BEYOND)
    torch.library.opcheck(torch.ops.lion_kernels.assemble_inputs.default, arguments)
    arguments = (torch.randn(2, 8, 48, device=device), inputs["input_ids"], BEYOND)
    torch.library.opcheck(torch.ops.lion_kernels.assemble_inputs_backward.default, arguments)


def test_the_operator_in_pytorch(monkeypatch: pytest.MonkeyPatch, relative_error: Measure) -> None:
    monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    inputs = make_inputs(2, 3, 5, 48)
    expected = exact(inputs)
    for name, value in outputs_and_gradients(torch.ops.lion_kernels.assemble_inputs, inputs).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_without_a_graph_break(backend: str, device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(2, 3, 5, 48, device=device)
    torch.compiler.reset()
    compiled = torch.compile(assemble_inputs, fullgraph=True, backend="aot_eager")
    expected = exact(inputs)
    for name, value in outputs_and_gradients(compiled, inputs, backend=backend).items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name
    with torch.no_grad():
        assert relative_error(compiled(**inputs, backend=backend), expected["out"]) == 0


def test_gradient_checkpointing(device: torch.device) -> None:
    inputs = make_inputs(2, 3, 5, 48, device=device)

    def checkpointed(**kwargs: Any) -> Any:
        return checkpoint(assemble_inputs, **kwargs, use_reentrant=False)

    expected = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    got = outputs_and_gradients(checkpointed, inputs, backend="triton")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    inputs = make_inputs(2, 3, 5, 48, device=device)
    inputs["prefix"] = inputs["prefix"].detach().half().requires_grad_()
    expected = outputs_and_gradients(assemble_inputs, inputs, backend=backend)
    with torch.autocast(device.type, dtype=torch.float16):
        got = outputs_and_gradients(assemble_inputs, inputs, backend=backend)
    assert got["out"].dtype == torch.float32
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_ids(data: st.DataObject, device: torch.device, relative_error: Measure) -> None:
    batch, prefix_length, length = (data.draw(st.integers(1, 6)) for _ in range(3))
    channels, step = data.draw(st.integers(1, 150), "channels"), data.draw(st.integers(1, 2), "step")
    soft_prompt_id = data.draw(st.sampled_from([0, 1, VOCABULARY - 1, BEYOND]), "soft_prompt_id")
    inputs = make_inputs(batch, prefix_length, length, channels * step, device=device, soft_prompt_id=soft_prompt_id)
    inputs |= {name: inputs[name].detach()[..., ::step].requires_grad_() for name in FLOATING}
    some_id = st.sampled_from([soft_prompt_id, *range(0, VOCABULARY, 9), VOCABULARY - 1])
    ids = data.draw(st.lists(some_id, min_size=batch * length, max_size=batch * length), "ids")
    inputs["input_ids"] = torch.tensor(ids, device=device).view(batch, length)
    expected = exact(inputs)
    for name, value in outputs_and_gradients(assemble_inputs, inputs, backend="triton").items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": torch.zeros(8)}, r"embedding: expected floating \[vocabulary, D\], got torch.float32 \[8\]"),
        ({"embedding": torch.zeros(9, 8).int()}, r"embedding: expected floating .*, got torch.int32 \[9, 8\]"),
        ({"prefix": torch.zeros(2, 3, 7)}, r"prefix: expected floating \[B, P, 8\] \(D from .*\), got .* \[2, 3, 7\]"),
        ({"prefix": torch.zeros(3, 8)}, r"prefix: expected floating \[B, P, 8\] \(D from embedding\), got .* \[3, 8\]"),
        ({"prefix": torch.zeros(2, 3, 8).int()}, r"prefix: expected floating \[B, P, 8\] .*, got torch.int32"),
        ({"input_ids": torch.zeros(3, 4).long()}, r"input_ids: expected int32 or int64 \[2, L\] .*, got .* \[3, 4\]"),
        ({"input_ids": torch.zeros(2).long()}, r"input_ids: expected int32 or int64 \[2, L\] .*, got .* \[2\]"),
        (
            {"input_ids": torch.zeros(2, 4)},
            r"input_ids: expected int32 or int64 \[2, L\] .*, got torch.float32 \[2, 4\]",
        ),
        ({"soft_prompt": torch.zeros(1, 8)}, r"soft_prompt: expected floating \[8\] .*, got torch.float32 \[1, 8\]"),
        ({"soft_prompt": torch.zeros(8).int()}, r"soft_prompt: expected floating \[8\] .*, got torch.int32 \[8\]"),
        ({"soft_prompt": torch.zeros(8, device="meta")}, r"soft_prompt: expected device cpu \(from .*\), got meta"),
        (
            {"input_ids": torch.tensor([[0, 9], [-1, 20]])},
            r"input_ids: expected ids from 0 to 8 \(from embedding\) or soft_prompt_id 20, got \[-1, 9\]",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, backend: str) -> None:
    inputs = {
        "prefix": torch.zeros(2, 3, 8),
        "input_ids": torch.zeros(2, 4, dtype=torch.int64),
        "embedding": torch.zeros(9, 8),
        "soft_prompt": torch.zeros(8),
        "soft_prompt_id": 20,
    }
    with pytest.raises(ValueError, match=message):
        assemble_inputs(**{**inputs, **change}, backend=backend)


def test_what_no_kernel_takes(device: torch.device) -> None:
    inputs = make_inputs(2, 3, 5, 48, torch.float64, device)
    with pytest.raises(
        ValueError, match="prefix: expected float16, bfloat16 or float32 for backend 'triton', got torch"
    ):
        assemble_inputs(**inputs, backend="triton")
    assert assemble_inputs(**inputs).dtype == torch.float64


def test_the_interpreter_refuses_bfloat16(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the kernels are compiled here")
    inputs = make_inputs(2, 3, 5, 48)
    for name in FLOATING:
        with pytest.raises(ValueError, match=f"^{name}: bfloat16 is not supported by Triton's interpreter"):
            assemble_inputs(**{**inputs, name: inputs[name].bfloat16()}, backend="triton")
    with pytest.raises(ValueError, match="grad: bfloat16 is not supported"):
        launch_backward(torch.zeros(2, 8, 48, dtype=torch.bfloat16), inputs["input_ids"], BEYOND)


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16, 289, 64, 2048, torch.bfloat16)
    ids, row = 8 * 16 * 64, 2 * 2048
    assert forward.bytes == ids + 2 * row * 16 * (289 + 64)
    assert backward.bytes == ids + row * 16 + row


@pytest.mark.gpu
def test_bfloat16_on_a_gpu(device: torch.device, relative_error: Measure) -> None:
    inputs = make_inputs(16, 289, 417, 2048, torch.bfloat16, device)
    expected, plain = exact(inputs), exact(inputs, torch.bfloat16)
    got = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    assert torch.equal(got["out"].cpu().double(), expected["out"])
    for name in FLOATING:
        assert relative_error(got[name], expected[name]) <= 2 * relative_error(plain[name], expected[name]), name


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    inputs = make_inputs(2**13, 33, 33, 4096, torch.bfloat16, device)
    with torch.no_grad():
        out = assemble_inputs(**inputs, backend="triton")
        inputs |= {"prefix": inputs["prefix"][-1:], "input_ids": inputs["input_ids"][-1:]}
        assert torch.equal(out[-1:], assemble_inputs(**inputs, backend="torch"))


@pytest.mark.gpu
def test_two_hundred_calls_give_the_same_bits(device: torch.device) -> None:
    inputs = make_inputs(16, 289, 417, 2048, torch.bfloat16, device)
    first = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    for _ in range(200):
        again = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(device: torch.device) -> None:
    inputs = make_inputs(16, 289, 417, 2048, torch.bfloat16, device)
    first = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    grad = torch.ones_like(first["out"])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = assemble_inputs(**inputs, backend="triton")
        torch.autograd.grad(out, [inputs["prefix"], inputs["soft_prompt"]], grad)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_a_cuda_graph_reads_new_ids(device: torch.device) -> None:
    inputs = make_inputs(4, 289, 17, 2048, torch.bfloat16, device)
    with torch.no_grad():
        assemble_inputs(**inputs, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = assemble_inputs(**inputs, backend="triton")
        inputs["input_ids"].copy_(inputs["input_ids"].flip(1))
        graph.replay()
        assert torch.equal(out, assemble_inputs(**inputs, backend="triton"))
