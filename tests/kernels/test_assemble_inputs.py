"""Tests of `assemble_inputs` beyond `test_contract.py`: ids inside and outside the table, no wait for the GPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lion_reference
from lion_fast.check.cases import Tensors
from lion_fast.check.compare import leaves
from lion_kernels.assemble_inputs import assemble_inputs, cost
from tests.kernels.contract import CPU, expect_close, results

pytestmark = pytest.mark.usefixtures("poison")
VOCABULARY = 50
BEYOND = VOCABULARY + 7  # the id of a soft prompt, outside the table
FLOATING = ("prefix", "embedding", "soft_prompt")


def make_inputs(
    batch: int, prefix_length: int, length: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Return inputs with repeated ids, and a soft prompt at every third position of every second sequence."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, prefix_length, channels), (VOCABULARY, channels), (channels,))
    tensors = {name: torch.randn(size, generator=generator) for name, size in zip(FLOATING, sizes, strict=True)}
    input_ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    input_ids[::2, ::3] = BEYOND
    return leaves({name: value.to(dtype) for name, value in tensors.items()} | {"input_ids": input_ids}, device=device)


def computed(tensors: Tensors, backend: str, soft_prompt_id: int = BEYOND) -> Tensors:
    return results(assemble_inputs, tensors, tensors | {"soft_prompt_id": soft_prompt_id}, backend=backend)


def exact(tensors: Tensors, soft_prompt_id: int) -> Tensors:
    """Return the reference's results, for a table that has a row for the soft prompt's id."""

    def extended(embedding: Tensor, input_ids: Tensor, **rest: Tensor) -> Tensor:
        longer = F.pad(embedding, (0, 0, 0, BEYOND + 1 - VOCABULARY), value=float("nan"))
        return lion_reference.assemble_inputs(
            embedding=longer, input_ids=input_ids.long(), soft_prompt_id=soft_prompt_id, **rest
        )

    wide = leaves(tensors, torch.float64, CPU)
    return results(extended, wide, wide)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0), (2, 0, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int], device: torch.device) -> None:
    got = computed(make_inputs(*sizes, 64, torch.float32, device), "triton")
    assert got["out"].shape == (sizes[0], sizes[1] + sizes[2], 64)
    assert torch.equal(got["soft_prompt"], torch.zeros_like(got["soft_prompt"]))
    assert torch.equal(got["embedding"], torch.zeros_like(got["embedding"]))


def test_an_unknown_id_where_nobody_can_wait(device: torch.device) -> None:
    """The custom op, as on a GPU or compiled, gives NaN for ids outside the table, and no gradient."""
    inputs = make_inputs(2, 3, 5, 48, torch.float32, device)
    good = assemble_inputs(**inputs, soft_prompt_id=BEYOND, backend="torch")
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
    inputs = make_inputs(batch, prefix_length, length, channels * step, torch.float32, device)
    inputs |= {name: inputs[name].detach()[..., ::step].requires_grad_() for name in FLOATING}
    some_id = st.sampled_from([soft_prompt_id, *range(0, VOCABULARY, 9), VOCABULARY - 1])
    ids = data.draw(st.lists(some_id, min_size=batch * length, max_size=batch * length), "ids")
    id_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    inputs["input_ids"] = torch.tensor(ids, device=device, dtype=id_dtype).view(batch, length)
    expected = exact(inputs, soft_prompt_id)
    got = computed(inputs, data.draw(st.sampled_from(["triton", "torch"])), soft_prompt_id)
    assert torch.equal(got["out"].cpu().double(), expected["out"])
    expect_close(got, expected)


def test_cost_counts_what_moves() -> None:
    forward, backward = cost(16, 289, 64, 2048, torch.bfloat16)
    ids, row = 8 * 16 * 64, 2 * 2048
    assert forward.bytes == ids + 2 * row * 16 * (289 + 64)
    assert backward.bytes == ids + row * 16 + row


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(device: torch.device) -> None:
    inputs = make_inputs(16, 289, 417, 2048, torch.bfloat16, device)
    grad = torch.ones_like(computed(inputs, "triton")["out"])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = assemble_inputs(**inputs, soft_prompt_id=BEYOND, backend="triton")
        torch.autograd.grad(out, [inputs["prefix"], inputs["soft_prompt"]], grad)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_a_cuda_graph_reads_new_ids(device: torch.device) -> None:
    arguments = {**make_inputs(4, 289, 17, 2048, torch.bfloat16, device), "soft_prompt_id": BEYOND}
    with torch.no_grad():
        assemble_inputs(**arguments, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = assemble_inputs(**arguments, backend="triton")
        arguments["input_ids"].copy_(arguments["input_ids"].flip(1))
        graph.replay()
        assert torch.equal(out, assemble_inputs(**arguments, backend="triton"))
