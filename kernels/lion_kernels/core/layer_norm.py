"""The kernels of `residual_layer_norm` and their launches; its module docstring has the algebra."""

import torch
from torch import Tensor

from lion_kernels.core.backend import LAUNCH, on_device, refuse_uninterpretable, tl, triton
from lion_kernels.core.dropout import keep_block, threshold_of
from lion_kernels.core.operator import empty_gradient
from lion_kernels.core.rowwise import as_rows, partial_sums, row_tile


@triton.jit
def residual_layer_norm_forward_kernel(
    p_x, p_residual, p_weight, p_bias, p_x_bias, p_seed, p_out, p_statistics, rows, stride_x, stride_residual, eps,
    threshold, scale,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_row, m_d = o_row < rows, o_d < D
    mask = m_row[:, None] & m_d[None, :]
    o_row_wide = o_row.to(tl.int64)[:, None]
    # [BT, BD]
    b_z = tl.load(p_x + o_row_wide * stride_x + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_residual = tl.load(p_residual + o_row_wide * stride_residual + o_d[None, :], mask=mask, other=0.0)
    if p_x_bias is not None:
        b_z += tl.load(p_x_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_seed is not None:
        b_z = tl.where(keep_block(p_seed, threshold, o_row, D, BT, BD), b_z * scale, 0.0)
    b_z += b_residual.to(tl.float32)
    # [BT]
    b_mean = tl.sum(b_z, 1) / D
    b_centred = tl.where(m_d[None, :], b_z - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) / D + eps)
    if p_statistics is not None:
        tl.store(p_statistics + o_row, b_mean, mask=m_row)
        tl.store(p_statistics + rows + o_row, b_rstd, mask=m_row)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_out = b_centred * b_rstd[:, None] * b_weight + b_bias
    tl.store(p_out + o_row_wide * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def residual_layer_norm_backward_kernel(
    p_grad, p_x, p_residual, p_weight, p_x_bias, p_seed, p_statistics, p_dx, p_dresidual, p_partial, rows, stride_grad,
    stride_x, stride_residual, threshold, scale,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute the inputs' gradients and partial sums; program i handles the tiles of rows i, i + num_programs, ...

    partial [programs, 3, D] holds the gradients of weight, bias and x_bias ([programs, 2, D] without x_bias).
    """
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # [1, BD]
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    # [BT, BD]
    b_dweight = tl.zeros([BT, BD], dtype=tl.float32)
    b_dbias = tl.zeros([BT, BD], dtype=tl.float32)
    b_dx_bias = tl.zeros([BT, BD], dtype=tl.float32)
    for i_tile in range(i_program, tl.cdiv(rows, BT), tl.num_programs(0)):
        o_row = i_tile * BT + tl.arange(0, BT)
        m_row = o_row < rows
        mask = m_row[:, None] & m_d[None, :]
        o_row_wide = o_row.to(tl.int64)[:, None]
        b_z = tl.load(p_x + o_row_wide * stride_x + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_residual = tl.load(p_residual + o_row_wide * stride_residual + o_d[None, :], mask=mask, other=0.0)
        b_grad = tl.load(p_grad + o_row_wide * stride_grad + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        # [BT, 1]
        b_mean = tl.load(p_statistics + o_row, mask=m_row, other=0.0)[:, None]
        b_rstd = tl.load(p_statistics + rows + o_row, mask=m_row, other=0.0)[:, None]
        # [BT, BD]
        if p_x_bias is not None:
            b_z += tl.load(p_x_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if p_seed is not None:
            m_keep = keep_block(p_seed, threshold, o_row, D, BT, BD)
            b_z = tl.where(m_keep, b_z * scale, 0.0)
        b_z += b_residual.to(tl.float32)
        b_n = (b_z - b_mean) * b_rstd
        b_dn = b_grad * b_weight
        b_dz = (b_dn - (tl.sum(b_dn, 1) / D)[:, None] - b_n * (tl.sum(b_dn * b_n, 1) / D)[:, None]) * b_rstd
        if p_dresidual is not None:
            p_to = p_dresidual + o_row_wide * D + o_d[None, :]
            tl.store(p_to, b_dz.to(p_dresidual.dtype.element_ty), mask=mask)
        if p_seed is not None:
            b_dz = tl.where(m_keep, b_dz * scale, 0.0)
        if p_dx is not None:
            tl.store(p_dx + o_row_wide * D + o_d[None, :], b_dz.to(p_dx.dtype.element_ty), mask=mask)
        if p_partial is not None:
            b_dweight += b_grad * b_n
            b_dbias += b_grad
            if p_x_bias is not None:
                b_dx_bias += b_dz
    if p_partial is not None:
        p_to = p_partial + i_program.to(tl.int64) * ((2 if p_x_bias is None else 3) * D) + o_d
        tl.store(p_to, tl.sum(b_dweight, 0), mask=m_d)
        tl.store(p_to + D, tl.sum(b_dbias, 0), mask=m_d)
        if p_x_bias is not None:
            tl.store(p_to + 2 * D, tl.sum(b_dx_bias, 0), mask=m_d)


def launch_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    *,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return `out` and, with `statistics`, each row's mean and 1 / sqrt(var + eps), fp32 [2, rows]."""
    refuse_uninterpretable(x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    channels = x.shape[-1]
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    rows = x_rows.shape[0]
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    saved = torch.empty(2, rows, dtype=torch.float32, device=x.device) if statistics else None
    if out.numel():
        tile = row_tile("residual_layer_norm_forward", channels)
        with on_device(x):
            residual_layer_norm_forward_kernel[(triton.cdiv(rows, tile["BT"]),)](
                x_rows, residual_rows, weight.contiguous(), bias.contiguous(),
                None if x_bias is None else x_bias.contiguous(), seed, out, saved, rows, x_rows.stride(0),
                residual_rows.stride(0), eps, threshold_of(dropout_p), 1 / (1 - dropout_p), **tile, **LAUNCH,
            )  # fmt: skip
    return out, saved


def fake_forward(x, residual, weight, bias, x_bias, seed, dropout_p, eps):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dresidual (empty if it equals dx), and the gradients of weight, bias and x_bias in fp32 [2 or 3, D].

    Args:
        needs: whether to compute the gradients of x, of residual, and of the parameters; the others are empty.
    """
    refuse_uninterpretable(grad=grad, x=x, residual=residual, weight=weight, x_bias=x_bias)
    channels = x.shape[-1]
    grad_rows, x_rows, residual_rows = as_rows(grad), as_rows(x), as_rows(residual)
    rows = x_rows.shape[0]
    needs_x, needs_residual = written_gradients(x, residual, seed, needs)
    dx = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    dresidual = torch.empty(x.shape if needs_residual else (0,), dtype=residual.dtype, device=x.device)
    tile = row_tile("residual_layer_norm_backward", channels)
    tiles = triton.cdiv(rows, tile["BT"])
    programs, partial = tiles, None
    if needs[2]:
        # About 128 registers per thread without dropout, 170 with it.
        programs = partial_sums(tiles, tile["num_warps"], x.device, resident_warps=16 if seed is None else 12)
        sums = 2 if x_bias is None else 3
        partial = torch.empty(programs, sums, channels, dtype=torch.float32, device=x.device)
    if programs:
        with on_device(x):
            residual_layer_norm_backward_kernel[(programs,)](
                grad_rows, x_rows, residual_rows, weight.contiguous(), None if x_bias is None else x_bias.contiguous(),
                seed, statistics, dx if needs_x else None, dresidual if needs_residual else None, partial, rows,
                grad_rows.stride(0), x_rows.stride(0), residual_rows.stride(0), threshold_of(dropout_p),
                1 / (1 - dropout_p), **tile, **LAUNCH,
            )  # fmt: skip
    return dx, dresidual, x.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)


def fake_backward(grad, x, residual, weight, x_bias, seed, statistics, dropout_p, needs):
    needs_x, needs_residual = written_gradients(x, residual, seed, needs)
    sums = (2 if x_bias is None else 3, x.shape[-1]) if needs[2] else (0,)
    return (
        empty_gradient(x, needs_x),
        empty_gradient(residual, needs_residual),
        x.new_empty(sums, dtype=torch.float32),
    )


def gradients_differ(x: Tensor, residual: Tensor, seed: Tensor | None) -> bool:
    """Return whether dx and dresidual differ."""
    return seed is not None or x.dtype != residual.dtype


def written_gradients(x: Tensor, residual: Tensor, seed: Tensor | None, needs: list[bool]) -> tuple[bool, bool]:
    """Return whether backward writes dx and dresidual; if they are equal, dx serves as both."""
    needs_x, needs_residual, _ = needs
    return (needs_x, needs_residual) if gradients_differ(x, residual, seed) else (needs_x or needs_residual, False)
