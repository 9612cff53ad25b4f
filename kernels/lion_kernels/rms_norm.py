"""RMS norm, T5's layer norm: no mean, no bias (Zhang and Sennrich, arXiv 1910.07467).

    n = x / sqrt(mean(x^2) + eps)                       in fp32
    out = round(n) * weight                             in weight's dtype

n is rounded to the dtype of a half-precision weight before the multiplication, as in transformers' T5LayerNorm, with
which the published T5 models were trained; `F.rms_norm` rounds only the product. Backward treats the rounding as the
identity:

    dn = g * weight,   dx = (dn - n * mean(dn * n)) / sqrt(mean(x^2) + eps),   dweight = sum over rows of g * round(n)

Forward saves x and one number per row.
"""

from typing import Any

import torch
from torch import Tensor

from lion_kernels.core import operator
from lion_kernels.core.arguments import FLOATING, as_positive, check_tensors
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
from lion_kernels.core.rowwise import WIDTHS, as_rows, norm_specs, partial_sums, row_tile, why_unsupported
from lion_kernels.core.specs import KernelSpec

MAX_CHANNELS = 8192  # one program holds a row in registers
RESIDENT_WARPS = 16  # backward uses up to 118 of a multiprocessor's 65536 registers per thread


@triton.jit
def rms_norm_forward_kernel(
    p_x, p_weight, p_out, p_rstd, rows, stride_x, eps, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    o_row = tl.program_id(0) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_row, m_d = o_row < rows, o_d < D
    mask = m_row[:, None] & m_d[None, :]
    o_row_wide = o_row.to(tl.int64)[:, None]
    # [BT, BD]
    b_x = tl.load(p_x + o_row_wide * stride_x + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    # [BT]
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
    if p_rstd is not None:
        tl.store(p_rstd + o_row, b_rstd, mask=m_row)
    # [BD]
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    b_rounded = (b_x * b_rstd[:, None]).to(b_weight.dtype).to(tl.float32)
    b_out = b_rounded * b_weight.to(tl.float32)[None, :]
    tl.store(p_out + o_row_wide * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    p_grad, p_x, p_weight, p_rstd, p_dx, p_partial, rows, stride_grad, stride_x,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute dx and a partial dweight; program i handles the tiles of rows i, i + num_programs, ..."""
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    b_scale = b_weight.to(tl.float32)[None, :]
    # [BT, BD]
    b_sum = tl.zeros([BT, BD], dtype=tl.float32)
    for i_tile in range(i_program, tl.cdiv(rows, BT), tl.num_programs(0)):
        o_row = i_tile * BT + tl.arange(0, BT)
        m_row = o_row < rows
        mask = m_row[:, None] & m_d[None, :]
        o_row_wide = o_row.to(tl.int64)[:, None]
        b_x = tl.load(p_x + o_row_wide * stride_x + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o_row_wide * stride_grad + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        # [BT, 1]
        b_rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)[:, None]
        # [BT, BD]
        b_n = b_x * b_rstd
        b_dn = b_grad * b_scale
        if p_dx is not None:
            b_dx = (b_dn - b_n * (tl.sum(b_dn * b_n, 1) / D)[:, None]) * b_rstd
            tl.store(p_dx + o_row_wide * D + o_d[None, :], b_dx.to(p_dx.dtype.element_ty), mask=mask)
        if p_partial is not None:
            b_sum += b_grad * b_n.to(b_weight.dtype).to(tl.float32)
    if p_partial is not None:
        tl.store(p_partial + i_program.to(tl.int64) * D + o_d, tl.sum(b_sum, 0), mask=m_d)


def launch_forward(x: Tensor, weight: Tensor, eps: float, *, statistics: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return `out`, like x in weight's dtype, and with `statistics` the rows' 1 / sqrt(mean(x^2) + eps) in fp32."""
    refuse_uninterpretable(x=x, weight=weight)
    channels = x.shape[-1]
    x_rows = as_rows(x)
    rows = x_rows.shape[0]
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device) if statistics else None
    if out.numel():
        tile = row_tile("rms_norm_forward", channels)
        with on_device(x):
            rms_norm_forward_kernel[(triton.cdiv(rows, tile["BT"]),)](
                x_rows, weight.contiguous(), out, rstd, rows, x_rows.stride(0), eps, **tile, **LAUNCH
            )
    return out, rstd


def launch_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Return dx, like x, and dweight [D] in fp32; a gradient that `needs` excludes is empty."""
    refuse_uninterpretable(grad=grad, x=x)
    channels = x.shape[-1]
    grad_rows, x_rows = as_rows(grad), as_rows(x)
    rows = x_rows.shape[0]
    needs_x, needs_weight = needs
    dx = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    tile = row_tile("rms_norm_backward", channels)
    tiles = triton.cdiv(rows, tile["BT"])
    programs, partial = tiles, None
    if needs_weight:
        programs = partial_sums(tiles, tile["num_warps"], x.device, resident_warps=RESIDENT_WARPS)
        partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    if programs:
        with on_device(x):
            rms_norm_backward_kernel[(programs,)](
                grad_rows, x_rows, weight.contiguous(), rstd, dx if needs_x else None, partial, rows,
                grad_rows.stride(0), x_rows.stride(0), **tile, **LAUNCH,
            )  # fmt: skip
    return dx, x.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)


def plain_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `launch_forward` in PyTorch."""
    out, rstd = _formula(x, weight, eps)
    return out.contiguous(), rstd.flatten().float()


def plain_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    needs_x, needs_weight = needs
    scale = rstd.view(*x.shape[:-1], 1)
    n = x * scale
    dx = dweight = n.new_empty(0)
    if needs_x:
        dn = grad * weight.to(n.dtype)
        dx = (dn - n * (dn * n).mean(-1, keepdim=True)) * scale
    if needs_weight:
        dweight = (grad * n.to(weight.dtype).to(n.dtype)).flatten(0, -2).sum(0)
    return dx.to(x.dtype, copy=True).contiguous(), dweight.float()


def _formula(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `out` and 1 / sqrt(mean(x^2) + eps) [..., 1]; bit-identical to T5LayerNorm below fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x * rstd).to(weight.dtype), rstd


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    dx, dweight = backward_op(grad, x, weight, rstd, [needs_x, needs_weight])
    return dx if needs_x else None, dweight.to(weight.dtype) if needs_weight else None, None


def cost(rows: int, channels: int, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward for x [rows, channels], with x and weight of one dtype.

    Forward reads x and weight, and writes out. Backward reads the gradient, x, weight and rstd, and writes dx and
    dweight.
    """
    values = rows * channels
    return (
        Cost(dtype.itemsize * (2 * values + channels), 4 * values),
        Cost(dtype.itemsize * (3 * values + 2 * channels) + 4 * rows, 10 * values),
    )


def kernel_specs() -> list[KernelSpec]:
    kinds = {"rows": "i32", "eps": "fp32", "p_rstd": "*fp32", "p_partial": "*fp32"}
    return [
        *norm_specs(rms_norm_forward_kernel, WIDTHS, kinds, {"training": (), "inference": ("p_rstd",)}),
        *norm_specs(
            rms_norm_backward_kernel,
            WIDTHS,
            kinds,
            {"training": (), "frozen weight": ("p_partial",), "frozen x": ("p_dx",)},
        ),
    ]


backward_op = operator.define("rms_norm_backward", launch=launch_backward, plain=plain_backward)
forward_op = operator.define(
    "rms_norm",
    launch=launch_forward,
    plain=plain_forward,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, rounded as in transformers' T5LayerNorm.

    The statistics are in fp32. The normalised x is rounded to the dtype of a half-precision weight before the product.

    Args:
        x: [..., D], any leading dimensions, floating; any of them may be 0.
        weight: [D], floating; its dtype may differ from x's.
        eps: positive, added to the mean of the squares.
        backend: "auto", "triton" or "torch". The kernels support fp16, bf16 and fp32, and D up to 8192; otherwise
            "auto" is "torch", which computes fp64 in fp64.

    Returns:
        [..., D] in weight's dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
    """
    _check(x, weight)
    eps = as_positive("eps", eps)
    unsupported = why_unsupported({"x": x, "weight": weight}, MAX_CHANNELS)
    if choose_backend(backend, "rms_norm", x.device, unsupported) == "torch" or not x.shape[-1]:
        return _formula(x, weight, eps)[0]
    if needs_dispatch(x, weight):
        return forward_op(x, weight, eps)[0]
    return launch_forward(x, weight, eps, statistics=False)[0]


def _check(x: Tensor, weight: Tensor) -> None:
    check_tensors({"x": x, "weight": weight})
    if x.dim() == 0 or x.dtype not in FLOATING:
        raise ValueError(f"x: expected floating [..., D], got {x.dtype} {list(x.shape)}")
    if weight.shape != x.shape[-1:] or weight.dtype not in FLOATING:
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"weight: expected floating [{x.shape[-1]}] (D from x), got {got}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} (from x), got {weight.device}")
