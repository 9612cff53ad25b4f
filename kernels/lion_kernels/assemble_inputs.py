"""The language model's input: the visual prefix, then the text's embeddings with the soft prompt inserted.

    out[b] = [prefix[b] | e(input_ids[b, 0]), e(input_ids[b, 1]), ...]
    e(id) = soft_prompt where id = soft_prompt_id, else embedding[id]

Forward is a single pass. In backward, dprefix is the first part of the gradient. dsoft_prompt sums the gradient over
the soft prompt's positions, in partial sums of fixed order. dembedding, if the table is trained, sums it over each id's
positions with PyTorch's embedding backward, which sorts the ids and is deterministic.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core import operator
from lion_kernels.core.arguments import FLOATING, as_int64, check_tensors, shown_ids
from lion_kernels.core.backend import (
    LAUNCH,
    autocast_dtype,
    choose_backend,
    needs_dispatch,
    on_device,
    refuse_uninterpretable,
    triton,
    values_on_host,
)
from lion_kernels.core.cost import Cost
from lion_kernels.core.gather import assemble_inputs_backward_kernel, assemble_inputs_forward_kernel
from lion_kernels.core.rowwise import last_contiguous, partial_sums, row_spec, why_unsupported
from lion_kernels.core.specs import KernelSpec
from lion_kernels.core.tuned_sizes import lookup, shipped

SUM_TILE = {"BT": 32, "BD": 128, "num_warps": 4}  # ids and channels of a tile of dsoft_prompt's sum


def _tile(channels: int) -> dict[str, int]:
    """Return the BD channels of a program: 16 values per thread, and enough for 16-byte accesses."""
    block = min(2048, max(256, triton.next_power_of_2(channels)))
    tile = lookup("assemble_inputs_forward", f"D{block}", {"BD": block, "num_warps": max(1, block // 512)})
    return {"D": channels, **tile}


def launch_forward(
    prefix: Tensor, input_ids: Tensor, embedding: Tensor, soft_prompt: Tensor, soft_prompt_id: int
) -> Tensor:
    refuse_uninterpretable(prefix=prefix, embedding=embedding, soft_prompt=soft_prompt)
    batch, prefix_length, channels = prefix.shape
    length = input_ids.shape[1]
    out = torch.empty(batch, prefix_length + length, channels, dtype=embedding.dtype, device=embedding.device)
    if out.numel():
        prefix, embedding = last_contiguous(prefix), last_contiguous(embedding)
        tile = _tile(channels)
        with on_device(embedding):
            assemble_inputs_forward_kernel[(batch * (prefix_length + length), triton.cdiv(channels, tile["BD"]))](
                prefix, input_ids.contiguous(), embedding, soft_prompt.contiguous(), out, prefix_length, length,
                embedding.shape[0], soft_prompt_id, prefix.stride(0), prefix.stride(1), embedding.stride(0), **tile,
                **LAUNCH,
            )  # fmt: skip
    return out


def launch_backward(grad: Tensor, input_ids: Tensor, soft_prompt_id: int) -> Tensor:
    """Return dsoft_prompt [D] in fp32 for the gradient [B, P + L, D] and the ids [B, L]."""
    refuse_uninterpretable(grad=grad)
    channels, (batch, length) = grad.shape[2], input_ids.shape
    grad = last_contiguous(grad)
    tile = {"D": channels, **lookup("assemble_inputs_backward", "all", SUM_TILE)}
    blocks = triton.cdiv(channels, tile["BD"])
    tiles = triton.cdiv(batch * length, tile["BT"])
    programs = partial_sums(tiles, tile["num_warps"] * blocks, grad.device, resident_warps=16)
    partial = torch.empty(programs, channels, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        assemble_inputs_backward_kernel[(programs, blocks)](
            grad, input_ids.contiguous(), partial, batch * length, grad.shape[1] - length, length, soft_prompt_id,
            grad.stride(0), grad.stride(1), **tile, **LAUNCH,
        )  # fmt: skip
    return partial.sum(0)


def plain_forward(
    prefix: Tensor, input_ids: Tensor, embedding: Tensor, soft_prompt: Tensor, soft_prompt_id: int
) -> Tensor:
    """Compute `launch_forward` in PyTorch."""
    is_soft_prompt = input_ids == soft_prompt_id
    text = F.embedding(input_ids.masked_fill(is_soft_prompt, 0), embedding)
    text = torch.where(is_soft_prompt.unsqueeze(-1), soft_prompt.to(text.dtype), text)
    if autocast_dtype(text) is None:
        return torch.cat([prefix.to(text.dtype), text], dim=1)
    with torch.autocast(text.device.type, enabled=False):  # which refuses to concatenate in the other half precision
        return torch.cat([prefix.to(text.dtype), text], dim=1)


def plain_backward(grad: Tensor, input_ids: Tensor, soft_prompt_id: int) -> Tensor:
    return grad[:, grad.shape[1] - input_ids.shape[1] :][input_ids == soft_prompt_id].float().sum(0)


def fake_backward(grad: Tensor, input_ids: Tensor, soft_prompt_id: int) -> Tensor:
    return grad.new_empty(grad.shape[2], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    prefix, input_ids, embedding, soft_prompt, ctx.soft_prompt_id = inputs
    ctx.save_for_backward(input_ids)
    ctx.prefix_length, ctx.prefix_dtype = prefix.shape[1], prefix.dtype
    ctx.vocabulary, ctx.soft_prompt_dtype = embedding.shape[0], soft_prompt.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
    (input_ids,) = ctx.saved_tensors
    dprefix = dembedding = dsoft_prompt = None
    if ctx.needs_input_grad[0]:
        dprefix = grad[:, : ctx.prefix_length].to(ctx.prefix_dtype)
    if ctx.needs_input_grad[2]:
        known = (input_ids != ctx.soft_prompt_id) & (input_ids >= 0) & (input_ids < ctx.vocabulary)
        rows = torch.where(known.unsqueeze(-1), grad[:, ctx.prefix_length :], 0.0)
        ids = input_ids.masked_fill(~known, 0)
        dembedding = torch.ops.aten.embedding_dense_backward(rows, ids, ctx.vocabulary, -1, False)
    if ctx.needs_input_grad[3]:
        dsoft_prompt = backward_op(grad, input_ids, ctx.soft_prompt_id).to(ctx.soft_prompt_dtype)
    return dprefix, None, dembedding, dsoft_prompt, None


def cost(batch: int, prefix_length: int, length: int, channels: int, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward, with everything of one dtype, int64 ids and a frozen table.

    Forward reads one row per row written, and the ids. Backward reads the ids and the gradient of one soft prompt per
    sequence; dprefix is a view of the gradient.
    """
    ids, row = 8 * batch * length, dtype.itemsize * channels
    return (
        Cost(ids + 2 * batch * (prefix_length + length) * row, 0),
        Cost(ids + (batch + 1) * row, batch * channels),
    )


def kernel_specs() -> list[KernelSpec]:
    integers = ("prefix_length", "length", "vocabulary", "soft_prompt_id", "rows")
    kinds = {**dict.fromkeys(integers, "i32"), "p_ids": "*i64", "p_partial": "*fp32"}
    forward: Any = assemble_inputs_forward_kernel
    backward: Any = assemble_inputs_backward_kernel
    specs = []
    for channels, dtype in itertools.product((64, 176, 2048, 4096), ("bf16", "fp32")):
        default = _tile(channels)
        measured = (tile for tile in shipped("assemble_inputs_forward") if tile["BD"] == default["BD"])
        for tile in (default, *measured):
            sizes = {"D": channels, "BD": tile["BD"]}
            name = f"D={channels} BD={tile['BD']}"
            specs.append(row_spec(name, forward, dtype, kinds, sizes, tile["num_warps"]))
        for tile in (SUM_TILE, *shipped("assemble_inputs_backward")):
            sizes = {"D": channels, "BT": tile["BT"], "BD": tile["BD"]}
            name = f"D={channels} BT={tile['BT']} BD={tile['BD']}"
            specs.append(row_spec(name, backward, dtype, kinds, sizes, tile["num_warps"]))
    return specs


backward_op = operator.define(
    "assemble_inputs_backward", launch=launch_backward, plain=plain_backward, fake=fake_backward
)
forward_op = operator.define(
    "assemble_inputs",
    launch=launch_forward,
    plain=plain_forward,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


def assemble_inputs(
    prefix: Tensor,
    input_ids: Tensor,
    embedding: Tensor,
    soft_prompt: Tensor,
    soft_prompt_id: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Concatenate the prefix and the text's embeddings, where `soft_prompt` embeds the token `soft_prompt_id`.

    Nothing synchronises with the GPU: for an id beyond the table, the kernel writes NaN and backward ignores the id.

    Args:
        prefix: [B, P, D], floating; its dtype may differ from the embedding's. B, P, L and D may be 0.
        input_ids: [B, L], int32 or int64.
        embedding: [vocabulary, D], floating; the language model's table, of at least one row.
        soft_prompt: [D], floating; its dtype may differ from the embedding's.
        soft_prompt_id: an int64, which may lie beyond the table.
        backend: "auto", "triton" or "torch". The kernels support fp16, bf16 and fp32; otherwise "auto" is "torch".

    Returns:
        [B, P + L, D] in the embedding's dtype, which is the language model's.

    Raises:
        TypeError: an argument of another type; the message names it.
        ValueError: invalid shape, dtype, layout, device or backend or, on a CPU, an id beyond the table; the message
            names the argument.
    """
    soft_prompt_id = as_int64("soft_prompt_id", soft_prompt_id)
    _check(prefix, input_ids, embedding, soft_prompt, soft_prompt_id)
    arguments = (prefix, input_ids, embedding, soft_prompt, soft_prompt_id)
    floating: dict[str, Tensor | None] = {"prefix": prefix, "embedding": embedding, "soft_prompt": soft_prompt}
    chosen = choose_backend(backend, "assemble_inputs", embedding.device, why_unsupported(floating))
    if chosen == "torch" or not embedding.shape[1]:
        return plain_forward(*arguments)
    return forward_op(*arguments) if needs_dispatch(*floating.values()) else launch_forward(*arguments)


def _check(prefix: Tensor, input_ids: Tensor, embedding: Tensor, soft_prompt: Tensor, soft_prompt_id: int) -> None:
    check_tensors({"prefix": prefix, "input_ids": input_ids, "embedding": embedding, "soft_prompt": soft_prompt})
    if embedding.dim() != 2 or embedding.dtype not in FLOATING:
        raise ValueError(f"embedding: expected floating [vocabulary, D], got {embedding.dtype} {list(embedding.shape)}")
    vocabulary, channels = embedding.shape
    if not vocabulary:
        raise ValueError(f"embedding: expected at least one row, got {list(embedding.shape)}")
    if prefix.dim() != 3 or prefix.shape[2] != channels or prefix.dtype not in FLOATING:
        raise ValueError(
            f"prefix: expected floating [B, P, {channels}] (D from embedding), got {prefix.dtype} {list(prefix.shape)}"
        )
    batch = prefix.shape[0]
    if input_ids.dim() != 2 or input_ids.shape[0] != batch or input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"input_ids: expected int32 or int64 [{batch}, L] (B from prefix), "
            f"got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if soft_prompt.shape != (channels,) or soft_prompt.dtype not in FLOATING:
        raise ValueError(
            f"soft_prompt: expected floating [{channels}] (D from embedding), "
            f"got {soft_prompt.dtype} {list(soft_prompt.shape)}"
        )
    for name, tensor in (("prefix", prefix), ("input_ids", input_ids), ("soft_prompt", soft_prompt)):
        if tensor.device != embedding.device:
            raise ValueError(f"{name}: expected device {embedding.device} (from embedding), got {tensor.device}")
    if values_on_host(input_ids):
        strange = (input_ids != soft_prompt_id) & ((input_ids < 0) | (input_ids >= vocabulary))
        if strange.any():
            raise ValueError(
                f"input_ids: expected ids from 0 to {vocabulary - 1} (from embedding) or soft_prompt_id "
                f"{soft_prompt_id}, got {shown_ids(input_ids[strange])}"
            )
