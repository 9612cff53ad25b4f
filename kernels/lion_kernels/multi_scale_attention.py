"""Attention from one set of queries to several feature maps, one softmax per map (LION, arXiv 2311.11860).

    out_s = softmax(scale * q k_s^T) v_s                  and with a gate  out = sum_s gate_s * out_s

Backward, for a gradient g of `out` and delta_s = rowsum(g * out_s):

    ds_s = p_s * (g v_s^T - delta_s)          dq = scale * sum_s gate_s * ds_s k_s
    dk_s = scale * gate_s * ds_s^T q          dv_s = gate_s * p_s^T g          dgate_s = sum(delta_s)

Without a gate every map has a gradient g_s of its own, and gate_s = 1. `attention` has the kernels that one map
takes; what is here mixes maps. One map with q, k and v from the same source is self-attention.
"""

# A kernel's constexpr arguments take plain values, and a launch has keywords of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lion_kernels.attention import launch as attention
from lion_kernels.attention.launch import Attention
from lion_kernels.attention.plain import draw_keep, library_attention, plain_attention, plain_attention_backward
from lion_kernels.core.backend import (
    LAUNCH,
    interpreting,
    needs_dispatch,
    on_device,
    refuse_uninterpretable,
    resolve_backend,
    tl,
    triton,
)
from lion_kernels.core.cost import Cost
from lion_kernels.core.dropout import check_dropout, seed_tensor
from lion_kernels.core.rowwise import last_contiguous
from lion_kernels.core.specs import KernelSpec


@triton.jit(do_not_specialize=["rows"])
def _mix(
    p_maps,  # [rows, S, CHANNELS]
    p_gate,  # [S]
    p_out,  # [rows, CHANNELS]
    rows,
    MAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over the maps, weighed by the gate."""
    o_flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_flat = o_flat < rows.to(tl.int64) * CHANNELS
    p_map = p_maps + (o_flat // CHANNELS) * (MAPS * CHANNELS) + o_flat % CHANNELS
    b_out = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(MAPS):
        b_map = tl.load(p_map + s * CHANNELS, mask=m_flat, other=0.0).to(tl.float32)
        b_out += b_map * tl.load(p_gate + s).to(tl.float32)
    tl.store(p_out + o_flat, b_out.to(p_out.dtype.element_ty), mask=m_flat)


def _attentions(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> list[Attention]:
    """Those of the maps; a mask of no elements is none."""
    q = last_contiguous(q)
    return [
        Attention(
            q,
            last_contiguous(k),
            last_contiguous(v),
            scale,
            mask if mask.numel() else None,
            dropout_p=dropout_p,
            seed=seed,
            i_map=s,
        )
        for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True))
    ]


def _launch_forward(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    scale_gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, the maps' outputs [B, L, S, H, Dh] (the same tensor without a gate) and, to `save`, lse."""
    batch, length, heads, head_dim = q.shape
    maps = q.new_empty(batch, length, len(keys), heads, head_dim)
    lse = q.new_empty(len(keys), batch, heads, length, dtype=torch.float32) if save else None
    for s, one in enumerate(_attentions(q, keys, values, masks, seed, scale, dropout_p)):
        attention.attend(one, maps[:, :, s], None if lse is None else lse[s])
    if scale_gate is None:
        return maps, maps, lse
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows, channels, block = batch * length, heads * head_dim, 1024
    with on_device(q):
        _mix[(triton.cdiv(rows * channels, block),)](
            maps, scale_gate, out, rows, MAPS=len(keys), CHANNELS=channels, BLOCK=block, num_warps=4, **LAUNCH
        )
    return out, maps, lse


def _launch_backward(
    grad: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    scale_gate: Tensor | None,
    seed: Tensor | None,
    maps: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    grad = grad.contiguous()
    last = len(keys) - 1
    needs_q, needs_keys, needs_values, needs_gate = _split(needs)
    delta = torch.empty_like(lse)
    dq = _empty(q, needs_q)
    partial = torch.empty_like(dq, dtype=torch.float32) if last else dq
    dkeys = [_empty(k, needed) for k, needed in zip(keys, needs_keys, strict=True)]
    dvalues = [_empty(v, needed) for v, needed in zip(values, needs_values, strict=True)]
    for s, one in enumerate(_attentions(q, keys, values, masks, seed, scale, dropout_p)):
        attention.attend_backward(
            one,
            grad[:, :, s] if scale_gate is None else grad,
            maps[:, :, s],
            lse[s],
            delta[s] if needs_q or needs_gate or needs_keys[s] else None,
            (dq if s == last else partial) if needs_q else None,
            dkeys[s] if needs_keys[s] else None,
            dvalues[s] if needs_values[s] else None,
            gate=scale_gate,
            previous=partial if s and needs_q else None,
        )
    return dq, dkeys, dvalues, _gate_gradient(delta, scale_gate) if needs_gate else q.new_empty(0)


def _split(needs: Sequence[bool]) -> tuple[bool, Sequence[bool], Sequence[bool], bool]:
    """The gradients that are asked for: of q, of every map's keys and values, and of the gate."""
    number = len(needs) // 2 - 1
    return needs[0], needs[1 : 1 + number], needs[1 + number : -1], needs[-1]


def _empty(x: Tensor, needed: bool) -> Tensor:
    """Room for x's gradient, contiguous; none unless `needed`."""
    return x.new_empty(x.shape if needed else (0,))


def _gate_gradient(delta: Tensor, scale_gate: Tensor | None) -> Tensor:
    assert scale_gate is not None
    return delta.flatten(1).sum(1).to(scale_gate.dtype)


@torch.library.custom_op("lion_kernels::multi_scale_attention", mutates_args=(), device_types="cuda")
def _forward_op(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    masks: list[Tensor],
    scale_gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the maps' outputs (no elements without a gate: they are the result) and lse [S, B, H, L]."""
    out, maps, lse = _launch_forward(q, keys, values, masks, scale_gate, seed, scale, dropout_p, save=True)
    assert lse is not None
    return out, maps if scale_gate is not None else q.new_empty(0), lse


@_forward_op.register_kernel("cpu")
def _(q, keys, values, masks, scale_gate, seed, scale, dropout_p):
    if interpreting():
        out, maps, lse = _launch_forward(q, keys, values, masks, scale_gate, seed, scale, dropout_p, save=True)
    else:
        outputs = [
            plain_attention(q, k, v, None, _visible(mask), draw_keep(q, k, seed, dropout_p, s), scale)
            for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True))
        ]
        maps = torch.stack([out for out, _ in outputs], 2)
        lse = torch.stack([lse for _, lse in outputs])
        out = maps if scale_gate is None else _weighed_sum(maps, scale_gate)
    return out, maps if scale_gate is not None else q.new_empty(0), lse


@_forward_op.register_fake
def _(q, keys, values, masks, scale_gate, seed, scale, dropout_p):
    batch, length, heads, head_dim = q.shape
    maps = q.new_empty(batch, length, len(keys), heads, head_dim)
    lse = q.new_empty(len(keys), batch, heads, length, dtype=torch.promote_types(q.dtype, torch.float32))
    if scale_gate is None:
        return maps, q.new_empty(0), lse
    return q.new_empty(q.shape), maps, lse


@torch.library.custom_op("lion_kernels::multi_scale_attention_backward", mutates_args=(), device_types="cuda")
def _backward_op(
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
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """The gradients of q, keys, values and scale_gate; one that `needs`, in this order, does not name is empty."""
    return _launch_backward(grad, q, keys, values, masks, scale_gate, seed, maps, lse, scale, dropout_p, needs)


@_backward_op.register_kernel("cpu")
def _(grad, q, keys, values, masks, scale_gate, seed, maps, lse, scale, dropout_p, needs):
    if interpreting():
        return _launch_backward(grad, q, keys, values, masks, scale_gate, seed, maps, lse, scale, dropout_p, needs)
    needs_q, needs_keys, needs_values, needs_gate = _split(needs)
    dq, dkeys, dvalues = torch.zeros_like(q, dtype=lse.dtype), [], []
    delta = torch.empty_like(lse)
    for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        g = grad[:, :, s] if scale_gate is None else grad
        keep = draw_keep(q, k, seed, dropout_p, s)
        needs_of_map = (needs_q, needs_keys[s], needs_values[s])
        (dq_of_map, dk, dv), _, delta[s] = plain_attention_backward(
            g, q, k, v, maps[:, :, s], lse[s], None, _visible(mask), keep, scale, needs_of_map
        )
        factor = 1.0 if scale_gate is None else scale_gate[s].to(lse.dtype)
        if needs_q:
            dq += dq_of_map * factor
        dkeys.append((dk * factor).to(k.dtype))
        dvalues.append((dv * factor).to(v.dtype))
    dq = dq.to(q.dtype).contiguous() if needs_q else q.new_empty(0)
    return dq, dkeys, dvalues, _gate_gradient(delta, scale_gate) if needs_gate else q.new_empty(0)


@_backward_op.register_fake
def _(grad, q, keys, values, masks, scale_gate, seed, maps, lse, scale, dropout_p, needs):
    needs_q, needs_keys, needs_values, needs_gate = _split(needs)
    return (
        _empty(q, needs_q),
        [_empty(k, needed) for k, needed in zip(keys, needs_keys, strict=True)],
        [_empty(v, needed) for v, needed in zip(values, needs_values, strict=True)],
        torch.empty_like(scale_gate) if needs_gate else q.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    q, keys, values, masks, scale_gate, seed, ctx.scale, ctx.dropout_p = inputs
    out, maps, lse = output
    ctx.save_for_backward(q, *keys, *values, *masks, scale_gate, seed, out if scale_gate is None else maps, lse)
    ctx.mark_non_differentiable(maps, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    q, *maps_of, scale_gate, seed, maps, lse = ctx.saved_tensors
    number = len(maps_of) // 3
    keys, values, masks = maps_of[:number], maps_of[number : 2 * number], maps_of[2 * number :]
    nothing = [None] * number
    if grad is None:
        return None, nothing, nothing, nothing, None, None, None, None
    needs_q, needs_keys, needs_values, _, needs_gate, *_ = ctx.needs_input_grad
    needs = [needs_q, *needs_keys, *needs_values, needs_gate]
    dq, dkeys, dvalues, dgate = _backward_op(
        grad, q, keys, values, masks, scale_gate, seed, maps, lse, ctx.scale, ctx.dropout_p, needs
    )
    dkeys = [dk if needed else None for dk, needed in zip(dkeys, needs_keys, strict=True)]
    dvalues = [dv if needed else None for dv, needed in zip(dvalues, needs_values, strict=True)]
    return dq if needs_q else None, dkeys, dvalues, nothing, dgate if needs_gate else None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


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
    """Multi-head attention to S feature maps, of which each has a softmax of its own.

    Differentiable in q, keys, values and scale_gate. q, keys and values have one dtype and any strides, such as those
    of slices of a packed projection; under autocast they are cast to its dtype.

    Args:
        q: [B, L, H, Dh].
        keys, values: S tensors [B, L_s, H, Dh] each; lengths may differ.
        scale: factor of the scores, Dh^-0.5 by default.
        key_padding_mask: [B, L_s], nonzero where a key may be attended; one for all maps, or one (or None) per map.
        scale_gate: [S], factors of a sum over the maps.
        dropout_p: the share of the probabilities that dropout zeroes, of every map by itself; 0 outside training.
        seed: of dropout, an int64, or a tensor [] of one on q's device, which a CUDA graph reads at each replay; None
            draws one from PyTorch's generator, in a CUDA graph at each replay. The mask that belongs to it, the same in
            both backends, is `lion_kernels.attention.plain.dropout_mask`.
        backend: "auto", "triton" (fp16, bf16 or fp32, Dh a multiple of 8 up to 128) or "torch" (any).

    Returns:
        [B, L, S, H, Dh]; [B, L, H, Dh] with a `scale_gate` or where S = 1. A query that may attend no key of a map gets
        zeros from it.

    Raises:
        ValueError: a shape, a dtype, a device, dropout_p, seed or backend that does not fit; the message names it.
    """
    masks = _check(q, keys, values, key_padding_mask, scale_gate)
    check_dropout(dropout_p, seed, q.device)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = attention.autocast_dtype(q)
    if dtype is not None:
        q, keys, values = q.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
    chosen = resolve_backend(backend, "multi_scale_attention", q.device)
    seed = seed_tensor(seed, dropout_p, q.device)
    if chosen == "triton" and backend == "triton":
        attention.check_supported(q)
    if chosen == "torch" or not attention.supported(q):
        out = _compose(q, keys, values, masks, scale_gate, seed, factor, dropout_p)
    else:
        refuse_uninterpretable(q=q)
        arguments = (q, list(keys), list(values), masks, scale_gate, seed, factor, dropout_p)
        if needs_dispatch(q, *keys, *values, scale_gate):
            out = _forward_op(*arguments)[0]
        else:
            out = _launch_forward(*arguments, save=False)[0]
    return out.squeeze(2) if scale_gate is None and len(keys) == 1 else out


def _compose(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    scale_gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The operator in PyTorch: [B, L, S, H, Dh], or with a gate [B, L, H, Dh]."""
    outputs = []
    for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        if seed is None:
            outputs.append(library_attention(q, k, v, None, _visible(mask), scale))
        else:
            keep = draw_keep(q, k, seed, dropout_p, s)
            outputs.append(plain_attention(q, k, v, None, _visible(mask), keep, scale)[0])
    if len(outputs) == 1 and scale_gate is None:
        return outputs[0].unsqueeze(2)
    maps = torch.stack(outputs, 2)
    return maps if scale_gate is None else _weighed_sum(maps, scale_gate)


def _weighed_sum(maps: Tensor, scale_gate: Tensor) -> Tensor:
    return (maps * scale_gate[:, None, None]).sum(2).to(maps.dtype)


def _visible(mask: Tensor) -> Tensor | None:
    return mask[:, None, None, :] if mask.numel() else None


def _check(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_padding_mask: Tensor | Sequence[Tensor | None] | None,
    scale_gate: Tensor | None,
) -> list[Tensor]:
    """Raises ValueError for what does not fit; the masks, one per map, in bool and contiguous, empty where none is."""
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, L, H, Dh], got {list(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    batch, _, heads, head_dim = q.shape
    if not keys or len(keys) != len(values):
        raise ValueError(f"values: expected one per feature map of keys, got {len(values)} for {len(keys)} keys")
    if key_padding_mask is None or isinstance(key_padding_mask, Tensor):
        key_padding_mask = [key_padding_mask] * len(keys)
    if len(key_padding_mask) != len(keys):
        raise ValueError(f"key_padding_mask: expected {len(keys)} (from keys), got {len(key_padding_mask)}")
    if scale_gate is not None and tuple(scale_gate.shape) != (len(keys),):
        raise ValueError(f"scale_gate: expected {[len(keys)]} (from keys), got {list(scale_gate.shape)}")
    if scale_gate is not None and not scale_gate.is_floating_point():
        raise ValueError(f"scale_gate: expected a floating dtype, got {scale_gate.dtype}")
    masks: list[Tensor] = []
    for s, (k, v, mask) in enumerate(zip(keys, values, key_padding_mask, strict=True)):
        if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, head_dim):
            raise ValueError(f"keys[{s}]: expected {[batch, 'L_s', heads, head_dim]} (from q), got {list(k.shape)}")
        if v.shape != k.shape:
            raise ValueError(f"values[{s}]: expected {list(k.shape)} (from keys[{s}]), got {list(v.shape)}")
        if mask is not None and mask.shape != k.shape[:2]:
            raise ValueError(f"key_padding_mask: expected {list(k.shape[:2])} for keys[{s}], got {list(mask.shape)}")
        attention.check_alike(q, {f"keys[{s}]": k, f"values[{s}]": v})
        attention.check_device(q, {"key_padding_mask": mask})
        masks.append(q.new_empty(0, dtype=torch.bool) if mask is None else mask.bool().contiguous())
    attention.check_device(q, {"scale_gate": scale_gate})
    return masks


def cost(q: Tensor, keys: Sequence[Tensor], *, scale_gate: bool = False, mask: bool = False) -> tuple[Cost, Cost]:
    """What forward and backward cannot avoid moving and computing, from the shapes and the dtype.

    Forward reads q, keys and values and writes the result: the sum over the maps with a `scale_gate`, else every map's
    output. Backward reads those and the result's gradient, and writes the gradients of q, keys and values; it forms the
    scores again and has four products more.
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
    """Every kernel as it ships, for the ahead-of-time report."""
    name = "multi_scale_attention"
    specs: list[KernelSpec] = []
    for compact in (False, True):
        sized = partial(attention.specs, name, compact=compact)
        for head_dim in (8, 40, 64, 80, 88, 96, 128):
            specs += sized(head_dim)
        for head_dim in (64, 88, 128):
            specs += sized(head_dim, mask=True, gate=True, dropout=True)
            specs += sized(head_dim, torch.float32, mask=True, gate=True, dropout=True)
            for frozen in ("q", "k", "v"):
                specs += sized(head_dim, frozen=frozen)
            for rows in ("few", "some"):
                specs += sized(head_dim, rows=rows, mask=True)
    for kind in ("bf16", "fp32"):
        specs.append(
            KernelSpec(
                name=f"{name} mix {kind} 3x1408",
                kernel=_mix,
                signature={"p_maps": f"*{kind}", "p_gate": f"*{kind}", "p_out": f"*{kind}", "rows": "i32"},
                constexprs={"MAPS": 3, "CHANNELS": 1408, "BLOCK": 1024},
                num_warps=4,
                num_stages=2,
                matrix=False,
            )
        )
    return specs
