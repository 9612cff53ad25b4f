"""The gated activation of T5 1.1's feed-forward layer (Shazeer, arXiv 2002.05202), with the exact GELU as in LION.

    out = gate * Phi(gate) * up                         Phi: the normal distribution function
    dup = g * gate * Phi(gate)
    dgate = g * up * (Phi(gate) + gate * phi(gate))     phi: its density

Forward saves only gate and up for backward, which recomputes the GELU and its slope from the gate. There is no option
to save them: backward needs both gate * Phi(gate) and up * slope, so it would hold and read as many tensors as now, and
forward would write two more beside its output.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core import operator
from lion_kernels.core.arguments import FLOATING, check_tensors
from lion_kernels.core.backend import (
    LAUNCH,
    choose_backend,
    needs_dispatch,
    on_device,
    refuse_uninterpretable,
    tl,
    triton,
)
from lion_kernels.core.cost import Cost
from lion_kernels.core.rowwise import as_rows, row_spec, why_unsupported
from lion_kernels.core.specs import KernelSpec
from lion_kernels.core.tuned_sizes import lookup, shipped


@triton.jit
def normal_distribution(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1 / sqrt(2)


@triton.jit
def normal_density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)


@triton.jit
def gated_gelu_forward_kernel(
    p_gate, p_up, p_out, rows, stride_gate, stride_up, D, blocks, BT: tl.constexpr, BD: tl.constexpr
):
    """Compute one tile; program i has block i % blocks of BD channels in a tile of BT rows."""
    i_program = tl.program_id(0)
    o_row = (i_program // blocks * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    o_d = (i_program % blocks * BD + tl.arange(0, BD))[None, :]
    mask = (o_row < rows) & (o_d < D)
    # [BT, BD]
    b_gate = tl.load(p_gate + o_row * stride_gate + o_d, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_row * stride_up + o_d, mask=mask, other=0.0).to(tl.float32)
    b_out = b_gate * normal_distribution(b_gate) * b_up
    tl.store(p_out + o_row * D + o_d, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def gated_gelu_backward_kernel(
    p_grad, p_gate, p_up, p_dgate, p_dup, rows, stride_grad, stride_gate, stride_up, D, blocks,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_row = (i_program // blocks * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    o_d = (i_program % blocks * BD + tl.arange(0, BD))[None, :]
    mask = (o_row < rows) & (o_d < D)
    # [BT, BD]
    b_grad = tl.load(p_grad + o_row * stride_grad + o_d, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_row * stride_gate + o_d, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_row * stride_up + o_d, mask=mask, other=0.0).to(tl.float32)
    b_probability = normal_distribution(b_gate)
    b_slope = b_probability + b_gate * normal_density(b_gate)
    if p_dgate is not None:
        b_dgate = b_grad * b_up * b_slope
        tl.store(p_dgate + o_row * D + o_d, b_dgate.to(p_dgate.dtype.element_ty), mask=mask)
    if p_dup is not None:
        b_dup = b_grad * b_gate * b_probability
        tl.store(p_dup + o_row * D + o_d, b_dup.to(p_dup.dtype.element_ty), mask=mask)


def _tile(operator: str, channels: int) -> dict[str, int]:
    """Return BT rows and BD channels of a tile of 1024 values, 8 per thread: one 16-byte load in half precision."""
    block = min(1024, max(16, triton.next_power_of_2(channels)))
    return lookup(operator, f"D{block}", {"BT": 1024 // block, "BD": block, "num_warps": 4})


def launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    refuse_uninterpretable(gate=gate)
    channels = gate.shape[-1]
    gate_rows, up_rows = as_rows(gate), as_rows(up)
    rows = gate_rows.shape[0]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        tile = _tile("gated_gelu_forward", channels)
        blocks = triton.cdiv(channels, tile["BD"])
        with on_device(gate):
            gated_gelu_forward_kernel[(triton.cdiv(rows, tile["BT"]) * blocks,)](
                gate_rows, up_rows, out, rows, gate_rows.stride(0), up_rows.stride(0), channels, blocks, **tile,
                **LAUNCH,
            )  # fmt: skip
    return out


def launch_backward(grad: Tensor, gate: Tensor, up: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up; a gradient that `needs` excludes is empty."""
    refuse_uninterpretable(gate=gate)
    channels = gate.shape[-1]
    grad_rows, gate_rows, up_rows = as_rows(grad), as_rows(gate), as_rows(up)
    rows = gate_rows.shape[0]
    shapes = (gate.shape if needed else (0,) for needed in needs)
    dgate, dup = (torch.empty(shape, dtype=gate.dtype, device=gate.device) for shape in shapes)
    if gate.numel():
        tile = _tile("gated_gelu_backward", channels)
        blocks = triton.cdiv(channels, tile["BD"])
        with on_device(gate):
            gated_gelu_backward_kernel[(triton.cdiv(rows, tile["BT"]) * blocks,)](
                grad_rows, gate_rows, up_rows, dgate if needs[0] else None, dup if needs[1] else None, rows,
                grad_rows.stride(0), gate_rows.stride(0), up_rows.stride(0), channels, blocks, **tile, **LAUNCH,
            )  # fmt: skip
    return dgate, dup


def plain_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `launch_forward` in PyTorch."""
    return (F.gelu(gate) * up).contiguous()


def plain_backward(grad: Tensor, gate: Tensor, up: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dgate = torch.ops.aten.gelu_backward(grad * up, gate) if needs[0] else gate.new_empty(0)
    dup = grad * F.gelu(gate) if needs[1] else gate.new_empty(0)
    return dgate.contiguous(), dup.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    return operator.needed_gradients(backward_op(grad, *ctx.saved_tensors, needs), needs)


def cost(rows: int, channels: int, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward for gate and up [rows, channels].

    Forward reads gate and up and writes out; backward reads the gradient, gate and up and writes dgate and dup. The
    error function and the exponential count as one operation each.
    """
    values = rows * channels
    return Cost(3 * dtype.itemsize * values, 6 * values), Cost(5 * dtype.itemsize * values, 14 * values)


def kernel_specs() -> list[KernelSpec]:
    kinds = {"rows": "i32", "blocks": "i32", "D": "i32"}
    specs = []
    kernels: tuple[Any, ...] = (gated_gelu_forward_kernel, gated_gelu_backward_kernel)
    for kernel, channels, dtype in itertools.product(kernels, (64, 176, 5120), ("bf16", "fp32")):
        operator = kernel.__name__.removesuffix("_kernel")
        default = _tile(operator, channels)
        for tile in (default, *(tile for tile in shipped(operator) if tile["BD"] == default["BD"])):
            sizes = {"BT": tile["BT"], "BD": tile["BD"]}
            name = f"BT={tile['BT']} BD={tile['BD']}"
            specs.append(row_spec(name, kernel, dtype, kinds, sizes, tile["num_warps"]))
    return specs


backward_op = operator.define("gated_gelu_backward", launch=launch_backward, plain=plain_backward)
forward_op = operator.define(
    "gated_gelu",
    launch=launch_forward,
    plain=plain_forward,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


def gated_gelu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute `gate * Phi(gate) * up`, the exact GELU of the gate times up.

    Args:
        gate: [..., D], any leading dimensions, floating; a dimension may be 0. It may be half of a packed projection.
        up: [..., D] in gate's dtype; it may be the other half.
        backend: "auto", "triton" or "torch". The kernels support fp16, bf16 and fp32; otherwise "auto" is "torch".

    Returns:
        [..., D] in gate's dtype; the kernels compute in fp32 and round once.

    Raises:
        TypeError: an argument of another type; the message names it.
        ValueError: invalid shape, dtype, layout, device or backend; the message names the argument.
    """
    _check(gate, up)
    chosen = choose_backend(backend, "gated_gelu", gate.device, why_unsupported({"gate": gate}))
    if chosen == "torch" or not gate.shape[-1]:
        return F.gelu(gate) * up
    return forward_op(gate, up) if needs_dispatch(gate, up) else launch_forward(gate, up)


def _check(gate: Tensor, up: Tensor) -> None:
    check_tensors({"gate": gate, "up": up})
    if gate.dim() == 0 or gate.dtype not in FLOATING:
        raise ValueError(f"gate: expected floating [..., D], got {gate.dtype} {list(gate.shape)}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"up: expected {gate.dtype} {list(gate.shape)} on {gate.device} (from gate), "
            f"got {up.dtype} {list(up.shape)} on {up.device}"
        )
