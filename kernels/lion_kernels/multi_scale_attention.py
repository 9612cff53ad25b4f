"""Attention from one set of queries to several feature maps, with one softmax per map (LION, arXiv 2311.11860).

    out_s = softmax(scale * q k_s^T) v_s                  and with a gate  out = sum_s gate_s * out_s

Backward, for a gradient g of `out` and delta_s = rowsum(g * out_s):

    ds_s = p_s * (g v_s^T - delta_s)          dq = scale * sum_s gate_s * ds_s k_s
    dk_s = scale * gate_s * ds_s^T q          dv_s = gate_s * p_s^T g          dgate_s = sum(delta_s)

Without a gate, every map has its own gradient g_s, and gate_s = 1. Self-attention is the case of one map with q, k and
v from the same source. In `lion_kernels.attention`, forward.py and backward.py have the kernels of one map, and maps.py
iterates over the maps.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lion_kernels.attention import launch as attention
from lion_kernels.attention.arguments import check_maps
from lion_kernels.attention.maps import (
    Maps,
    compose,
    fake_backward,
    fake_forward,
    launch_backward,
    launch_forward,
    mix_spec,
    plain_backward,
    plain_forward,
)
from lion_kernels.attention.specs import attention_specs
from lion_kernels.core import operator
from lion_kernels.core.arguments import as_number
from lion_kernels.core.backend import autocast_dtype, choose_backend, needs_dispatch, refuse_uninterpretable
from lion_kernels.core.cost import Cost
from lion_kernels.core.dropout import check_dropout, seed_tensor
from lion_kernels.core.specs import KernelSpec


def _bundle(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    masks: list[Tensor],
    scale_gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple:
    return (Maps(q, keys, values, masks, scale_gate, seed, scale, dropout_p),)


def _bundle_backward(
    grad: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    masks: list[Tensor],
    scale_gate: Tensor | None,
    seed: Tensor | None,
    maps: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple:
    """Bundle the arguments of backward; without a gate, `maps` is the result itself."""
    return grad, Maps(q, keys, values, masks, scale_gate, seed, scale, dropout_p), maps, lse, needs


def _setup_context(ctx, inputs, output) -> None:
    q, keys, values, masks, scale_gate, seed, ctx.scale, ctx.dropout_p = inputs
    out, maps, lse = output
    ctx.save_for_backward(q, *keys, *values, *masks, scale_gate, seed, out if scale_gate is None else maps, lse)
    ctx.mark_non_differentiable(maps, lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    q, *maps_of, scale_gate, seed, maps, lse = ctx.saved_tensors
    number = len(maps_of) // 3
    keys, values, masks = maps_of[:number], maps_of[number : 2 * number], maps_of[2 * number :]
    nothing = [None] * number
    if grad is None:
        return None, nothing, nothing, nothing, None, None, None, None
    needs_q, needs_keys, needs_values, _, needs_gate, *_ = ctx.needs_input_grad
    needs = [needs_q, *needs_keys, *needs_values, needs_gate]
    dq, dkeys, dvalues, dgate = backward_op(
        grad, q, keys, values, masks, scale_gate, seed, maps, lse, ctx.scale, ctx.dropout_p, needs
    )
    dkeys = list(operator.needed_gradients(dkeys, needs_keys))
    dvalues = list(operator.needed_gradients(dvalues, needs_values))
    return dq if needs_q else None, dkeys, dvalues, nothing, dgate if needs_gate else None, None, None, None


def cost(q: Tensor, keys: Sequence[Tensor], *, scale_gate: bool = False, mask: bool = False) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward, from the shapes and the dtype.

    Forward reads q, keys and values and writes the result: the sum over the maps with a `scale_gate`, else every map's
    output. Backward reads the same and the result's gradient, and writes the gradients of q, keys and values; it
    recomputes the scores and has four more products.
    """
    size = q.element_size()
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * sum(k.shape[1] for k in keys)
    inputs = (q.numel() + 2 * sum(k.numel() for k in keys)) * size
    masks = q.shape[0] * sum(k.shape[1] for k in keys) if mask else 0
    maps = len(keys) * q.numel() * size
    out = q.numel() * size if scale_gate else maps
    lse = 4 * len(keys) * q.shape[0] * q.shape[1] * q.shape[2]
    forward = Cost(inputs + out + masks, 4 * pairs * q.shape[-1])
    backward = Cost(2 * inputs + maps + out + masks + lse, 10 * pairs * q.shape[-1])
    return forward, backward


def kernel_specs() -> list[KernelSpec]:
    """Return every kernel configuration that ships, for the ahead-of-time report."""
    name = "multi_scale_attention"
    specs: list[KernelSpec] = []
    for compact in (False, True):
        sized = partial(attention_specs, name, compact=compact)
        for head_dim in (8, 40, 64, 80, 88, 96, 128):
            specs += sized(head_dim)
        for head_dim in (64, 88, 128):
            specs += sized(head_dim, mask=True, gate=True, dropout=True)
            specs += sized(head_dim, torch.float32, mask=True, gate=True, dropout=True)
            for frozen in ("q", "k", "v"):
                specs += sized(head_dim, frozen=frozen)
            for rows in ("few", "some"):
                specs += sized(head_dim, rows=rows, mask=True)
    return [*specs, mix_spec(f"{name} mix bf16 3x1408", "bf16"), mix_spec(f"{name} mix fp32 3x1408", "fp32")]


backward_op = operator.define(
    "multi_scale_attention_backward",
    launch=launch_backward,
    plain=plain_backward,
    fake=fake_backward,
    bundle=_bundle_backward,
)
forward_op = operator.define(
    "multi_scale_attention",
    launch=launch_forward,
    plain=plain_forward,
    fake=fake_forward,
    bundle=_bundle,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


def multi_scale_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | Sequence[Tensor | None] | None = None,
    scale_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute multi-head attention to S feature maps, each with its own softmax.

    Differentiable in q, keys, values and scale_gate. q, keys and values share one dtype and may have any strides, such
    as slices of a packed projection; under autocast they are cast to its dtype.

    Args:
        q: [B, L, H, Dh]; B, L, H and L_s may be 0.
        keys, values: lists or tuples of S tensors [B, L_s, H, Dh] each; the lengths may differ.
        scale: finite factor of the scores, Dh^-0.5 by default.
        key_padding_mask: [B, L_s], bool, integers or floating, nonzero where a key may be attended; one for all maps,
            or one (or None) per map. Negative values, which belong to a mask that is added to the scores, are refused
            if they are on the CPU.
        scale_gate: [S], weights of a sum over the maps.
        dropout_p: probability of dropping an attention weight, independent per map; pass 0 outside training.
        seed: of the dropout, an int64 or an int64 tensor [] on q's device, which a CUDA graph reads at each replay.
            None draws a seed from PyTorch's generator, in a CUDA graph at each replay. Both backends derive the same
            mask from it, `lion_kernels.attention.plain.dropout_mask`.
        backend: "auto", "triton" (fp16, bf16 or fp32, Dh a multiple of 8 up to 128) or "torch" (any).

    Returns:
        [B, L, S, H, Dh]; [B, L, H, Dh] with a `scale_gate` or if S = 1. For a map in which a query may attend no key,
        the output is zero.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
    """
    masks = check_maps(q, keys, values, key_padding_mask, scale_gate)
    dropout_p = check_dropout(dropout_p, seed, "q", q)
    factor = q.shape[-1] ** -0.5 if scale is None else as_number("scale", scale)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, keys, values = q.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
    chosen = choose_backend(backend, "multi_scale_attention", q.device, attention.why_unsupported(q))
    seed = seed_tensor(seed, dropout_p, q.device)
    if scale_gate is not None:
        scale_gate = scale_gate.contiguous()
    call = Maps(q, list(keys), list(values), masks, scale_gate, seed, factor, dropout_p)
    if chosen == "torch":
        out = compose(call)
    else:
        refuse_uninterpretable(q=q)
        dispatched = needs_dispatch(q, *keys, *values, scale_gate)
        out = forward_op(*call)[0] if dispatched else launch_forward(call, save=False)[0]
    return out.squeeze(2) if scale_gate is None and len(keys) == 1 else out
