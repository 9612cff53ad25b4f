"""Attention to several feature maps, on the kernels and in PyTorch; `multi_scale_attention` has the algebra.

`lion_kernels.attention.launch` launches the kernels for one map; this module iterates over the maps and mixes them.
"""

# Launches pass plain values as constexpr arguments, and have additional keywords.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lion_kernels.attention import launch as attention
from lion_kernels.attention.launch import Attention
from lion_kernels.attention.plain import Terms, draw_keep, library_attention, plain_attention, plain_attention_backward
from lion_kernels.core.backend import LAUNCH, on_device, tl, triton
from lion_kernels.core.operator import empty_gradient
from lion_kernels.core.rowwise import last_contiguous
from lion_kernels.core.specs import KernelSpec


class Maps(NamedTuple):
    """One call, in the order of the custom op's arguments.

    Attributes:
        q: [B, L, H, Dh].
        keys, values: [B, L_s, H, Dh] per map.
        masks: contiguous bool [B, L_s] per map, true where a key may be attended; empty for a map without a mask.
        scale_gate: [S] or None.
        seed: of the dropout, int64 [] on q's device; None without dropout.
    """

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    masks: list[Tensor]
    scale_gate: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float

    @property
    def attentions(self) -> list[Attention]:
        """The maps as the kernels' `Attention`s."""
        q = last_contiguous(self.q)
        return [
            Attention(
                q,
                last_contiguous(k),
                last_contiguous(v),
                self.scale,
                mask if mask.numel() else None,
                dropout_p=self.dropout_p,
                seed=self.seed,
                i_map=s,
            )
            for s, (k, v, mask) in enumerate(zip(self.keys, self.values, self.masks, strict=True))
        ]


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
    """Sum over the maps, weighted by the gate."""
    o_flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_flat = o_flat < rows.to(tl.int64) * CHANNELS
    p_map = p_maps + (o_flat // CHANNELS) * (MAPS * CHANNELS) + o_flat % CHANNELS
    b_out = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(MAPS):
        b_map = tl.load(p_map + s * CHANNELS, mask=m_flat, other=0.0).to(tl.float32)
        b_out += b_map * tl.load(p_gate + s).to(tl.float32)
    tl.store(p_out + o_flat, b_out.to(p_out.dtype.element_ty), mask=m_flat)


def launch_forward(call: Maps, *, save: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the result, the maps' outputs [B, L, S, H, Dh] and, with `save`, lse [S, B, H, L].

    Without a gate, the maps' outputs are the result, and the second tensor is empty.
    """
    q, scale_gate, number = call.q, call.scale_gate, len(call.keys)
    batch, length, heads, head_dim = q.shape
    maps = q.new_empty(batch, length, number, heads, head_dim)
    lse = q.new_empty(number, batch, heads, length, dtype=torch.float32) if save else None
    for s, one in enumerate(call.attentions):
        attention.launch_forward(one, maps[:, :, s], None if lse is None else lse[s])
    if scale_gate is None:
        return maps, q.new_empty(0), lse
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows, channels, block = batch * length, heads * head_dim, 1024
    if not out.numel():
        return out, maps, lse
    with on_device(q):
        _mix[(triton.cdiv(rows * channels, block),)](
            maps, scale_gate, out, rows, MAPS=number, CHANNELS=channels, BLOCK=block, num_warps=4, **LAUNCH
        )
    return out, maps, lse


def launch_backward(
    grad: Tensor, call: Maps, maps: Tensor, lse: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Return the gradients of q, keys, values and scale_gate; one that `needs`, in this order, excludes is empty."""
    q, keys, values, _, scale_gate, *_ = call
    grad = grad.contiguous()
    last = len(keys) - 1
    needs_q, needs_keys, needs_values, needs_gate = split_needs(needs)
    delta = torch.empty_like(lse)
    dq = empty_gradient(q, needs_q)
    partial = torch.empty_like(dq, dtype=torch.float32) if last else dq
    dkeys = [empty_gradient(k, needed) for k, needed in zip(keys, needs_keys, strict=True)]
    dvalues = [empty_gradient(v, needed) for v, needed in zip(values, needs_values, strict=True)]
    for s, one in enumerate(call.attentions):
        attention.launch_backward(
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


def split_needs(needs: Sequence[bool]) -> tuple[bool, Sequence[bool], Sequence[bool], bool]:
    """Return the requested gradients: of q, of each map's keys and values, and of the gate."""
    number = len(needs) // 2 - 1
    return needs[0], needs[1 : 1 + number], needs[1 + number : -1], needs[-1]


def _gate_gradient(delta: Tensor, scale_gate: Tensor | None) -> Tensor:
    assert scale_gate is not None
    return delta.flatten(1).sum(1).to(scale_gate.dtype)


def fake_forward(call: Maps) -> tuple[Tensor, Tensor, Tensor]:
    q, number = call.q, len(call.keys)
    batch, length, heads, head_dim = q.shape
    maps = q.new_empty(batch, length, number, heads, head_dim)
    lse = q.new_empty(number, batch, heads, length, dtype=torch.promote_types(q.dtype, torch.float32))
    if call.scale_gate is None:
        return maps, q.new_empty(0), lse
    return q.new_empty(q.shape), maps, lse


def fake_backward(grad: Tensor, call: Maps, maps: Tensor, lse: Tensor, needs: Sequence[bool]):
    needs_q, needs_keys, needs_values, needs_gate = split_needs(needs)
    return (
        empty_gradient(call.q, needs_q),
        [empty_gradient(k, needed) for k, needed in zip(call.keys, needs_keys, strict=True)],
        [empty_gradient(v, needed) for v, needed in zip(call.values, needs_values, strict=True)],
        torch.empty_like(call.scale_gate) if call.scale_gate is not None and needs_gate else call.q.new_empty(0),
    )


def plain_forward(call: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `launch_forward` in PyTorch."""
    q, keys, values, masks, scale_gate, seed, scale, dropout_p = call
    outputs = [
        plain_attention(q, k, v, Terms(scale, None, _visible(mask), draw_keep(q, k, seed, dropout_p, s)))
        for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True))
    ]
    maps = torch.stack([out for out, _ in outputs], 2)
    lse = torch.stack([lse for _, lse in outputs])
    if scale_gate is None:
        return maps, q.new_empty(0), lse
    return _weighed_sum(maps, scale_gate), maps, lse


def plain_backward(
    grad: Tensor, call: Maps, maps: Tensor, lse: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Compute `launch_backward` in PyTorch."""
    q, keys, values, masks, scale_gate, seed, scale, dropout_p = call
    needs_q, needs_keys, needs_values, needs_gate = split_needs(needs)
    dq, dkeys, dvalues = torch.zeros_like(q, dtype=lse.dtype), [], []
    delta = torch.empty_like(lse)
    for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        g = grad[:, :, s] if scale_gate is None else grad
        terms = Terms(scale, None, _visible(mask), draw_keep(q, k, seed, dropout_p, s))
        needs_of_map = (needs_q, needs_keys[s], needs_values[s])
        (dq_of_map, dk, dv), _, delta[s] = plain_attention_backward(
            g, q, k, v, terms, maps[:, :, s], lse[s], needs_of_map
        )
        factor = 1.0 if scale_gate is None else scale_gate[s].to(lse.dtype)
        if needs_q:
            dq += dq_of_map * factor
        dkeys.append((dk * factor).to(k.dtype))
        dvalues.append((dv * factor).to(v.dtype))
    dq = dq.to(q.dtype).contiguous() if needs_q else q.new_empty(0)
    return dq, dkeys, dvalues, _gate_gradient(delta, scale_gate) if needs_gate else q.new_empty(0)


def compose(call: Maps) -> Tensor:
    """Compute the operator in PyTorch, differentiable by autograd: [B, L, S, H, Dh], or with a gate [B, L, H, Dh]."""
    q, keys, values, masks, scale_gate, seed, scale, dropout_p = call
    outputs = []
    for s, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        if seed is None:
            outputs.append(library_attention(q, k, v, None, _visible(mask), scale))
        else:
            terms = Terms(scale, None, _visible(mask), draw_keep(q, k, seed, dropout_p, s))
            outputs.append(plain_attention(q, k, v, terms)[0])
    if len(outputs) == 1 and scale_gate is None:
        return outputs[0].unsqueeze(2)
    maps = torch.stack(outputs, 2)
    return maps if scale_gate is None else _weighed_sum(maps, scale_gate)


def _weighed_sum(maps: Tensor, scale_gate: Tensor) -> Tensor:
    return (maps * scale_gate[:, None, None]).sum(2).to(maps.dtype)


def _visible(mask: Tensor) -> Tensor | None:
    return mask[:, None, None, :] if mask.numel() else None


def mix_spec(name: str, kind: str) -> KernelSpec:
    """Return the spec of the sum over three maps of 1408 channels, for the ahead-of-time report."""
    return KernelSpec(
        name=name,
        kernel=_mix,
        signature={"p_maps": f"*{kind}", "p_gate": f"*{kind}", "p_out": f"*{kind}", "rows": "i32"},
        constexprs={"MAPS": 3, "CHANNELS": 1408, "BLOCK": 1024},
        num_warps=4,
        num_stages=2,
        matrix=False,
    )
