"""Tests of `assemble_inputs` beyond `test_contract.py`: ids inside and outside the table, no wait for the GPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lion_kernels.assemble_inputs import assemble_inputs, cost
from lion_reference import assemble_inputs as reference
from tests.kernels.gradients import cast, outputs_and_gradients
from tests.rounding import OPERATOR_FP32, relative_error

pytestmark = pytest.mark.usefixtures("poison")
VOCABULARY = 50
BEYOND = VOCABULARY + 7  # the id of a soft prompt, outside the table
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
    """Return inputs with repeated ids, and a soft prompt at every third position of every second sequence."""
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
    """Return the reference's results on the CPU from the values of `inputs`, with the soft prompt's id in the table."""
    given = cast(inputs, dtype, "cpu")
    embedding = given["embedding"]
    longer = torch.cat([embedding, embedding.new_full((BEYOND + 1 - VOCABULARY, embedding.shape[1]), float("nan"))])

    def extended(embedding: Tensor, **rest: Any) -> Tensor:
        return reference(embedding=torch.cat([embedding, longer[VOCABULARY:].detach()]), **rest)

    return outputs_and_gradients(extended, {**given, "input_ids": given["input_ids"].long()})


@pytest.mark.parametrize("sizes", [(0, 3, 4, 64), (2, 3, 0, 64), (2, 0, 0, 64)])
def test_nothing_to_do(sizes: tuple[int, ...], device: torch.device) -> None:
    inputs = make_inputs(*sizes, device=device)
    got = outputs_and_gradients(assemble_inputs, inputs, backend="triton")
    assert got["out"].shape == (sizes[0], sizes[1] + sizes[2], 64)
    assert torch.equal(got["soft_prompt"], torch.zeros_like(got["soft_prompt"]))
    assert torch.equal(got["embedding"], torch.zeros_like(got["embedding"]))


def test_an_unknown_id_where_nobody_can_wait(device: torch.device) -> None:
    """The custom op, as on a GPU or compiled, gives NaN for ids outside the table, and no gradient."""
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


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_ids(data: st.DataObject, device: torch.device) -> None:
    batch, prefix_length, length = (data.draw(st.integers(1, 6)) for _ in range(3))
    channels, step = data.draw(st.integers(1, 150), "channels"), data.draw(st.integers(1, 2), "step")
    soft_prompt_id = data.draw(st.sampled_from([0, 1, VOCABULARY - 1, BEYOND]), "soft_prompt_id")
    inputs = make_inputs(batch, prefix_length, length, channels * step, device=device, soft_prompt_id=soft_prompt_id)
    inputs |= {name: inputs[name].detach()[..., ::step].requires_grad_() for name in FLOATING}
    some_id = st.sampled_from([soft_prompt_id, *range(0, VOCABULARY, 9), VOCABULARY - 1])
    ids = data.draw(st.lists(some_id, min_size=batch * length, max_size=batch * length), "ids")
    id_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    inputs["input_ids"] = torch.tensor(ids, device=device, dtype=id_dtype).view(batch, length)
    expected = exact(inputs)
    backend = data.draw(st.sampled_from(["triton", "torch"]))
    got = outputs_and_gradients(assemble_inputs, inputs, backend=backend)
    assert torch.equal(got["out"].cpu().double(), expected["out"])
    for name, value in got.items():
        assert relative_error(value, expected[name]) < OPERATOR_FP32, name


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16, 289, 64, 2048, torch.bfloat16)
    ids, row = 8 * 16 * 64, 2 * 2048
    assert forward.bytes == ids + 2 * row * 16 * (289 + 64)
    assert backward.bytes == ids + row * 16 + row


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    inputs = make_inputs(2**13, 33, 33, 4096, torch.bfloat16, device)
    with torch.no_grad():
        out = assemble_inputs(**inputs, backend="triton")
        inputs |= {"prefix": inputs["prefix"][-1:], "input_ids": inputs["input_ids"][-1:]}
        assert torch.equal(out[-1:], assemble_inputs(**inputs, backend="torch"))


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
