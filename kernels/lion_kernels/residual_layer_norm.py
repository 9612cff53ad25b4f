"""BERT's post-norm step: bias, dropout, residual and LayerNorm (Devlin et al., arXiv 1810.04805).

    z = (x + x_bias) * mask + residual                  mask 0 with probability p, else 1 / (1 - p)
    n = (z - mean(z)) / sqrt(var(z) + eps)              in fp32
    out = n * weight + bias

    dn = g * weight,   dz = (dn - mean(dn) - n * mean(dn * n)) / sqrt(var(z) + eps)
    dresidual = dz,   dx = dz * mask
    dweight, dbias, dx_bias = sums over rows of g * n, g, dx

Saved for backward: x, residual, and mean and deviation of each row. z is summed again: writing it in forward to read it
in backward would move as many bytes, and in half precision it would come back rounded.

The mask is a function of (seed, row, column) alone (`lion_kernels.core.dropout`), so backward computes it again, and
`dropout_mask` gives it as a tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core.backend import (
    LAUNCH,
    interpreting,
    needs_dispatch,
    on_device,
    refuse_uninterpretable,
    tl,
    triton,
)
from lion_kernels.core.cost import Cost
from lion_kernels.core.dropout import check_dropout, keep_four, keeps, seed_tensor, threshold_of
from lion_kernels.core.rowwise import WIDTHS, as_rows, is_supported, norm_specs, partial_sums, row_tile
from lion_kernels.core.specs import KernelSpec

MAX_CHANNELS = 4096  # a row and its part of three sums live in the registers of one program


@triton.jit
def keep_block(p_seed, threshold, o_row, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """[BT, BD], true where dropout keeps the value."""
    # [BT, BD / 4]
    b_row = o_row[:, None] + tl.zeros([BT, BD // 4], dtype=tl.int32)
    b_quad = tl.arange(0, BD // 4)[None, :] + tl.zeros([BT, BD // 4], dtype=tl.int32)
    b_zero = tl.zeros([BT, BD // 4], dtype=tl.int32)
    return tl.reshape(keep_four(tl.load(p_seed), threshold, b_quad, b_row, b_zero, b_zero), [BT, BD]) != 0


@triton.jit
def residual_layer_norm_forward_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_x_bias,
    p_seed,
    p_out,
    p_statistics,
    rows,
    stride_x,
    stride_residual,
    eps,
    threshold,
    scale,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
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
    p_grad,
    p_x,
    p_residual,
    p_weight,
    p_x_bias,
    p_seed,
    p_statistics,
    p_dx,
    p_dresidual,
    p_partial,
    rows,
    stride_grad,
    stride_x,
    stride_residual,
    threshold,
    scale,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Program i takes every num_programs-th tile of rows from the i-th on, and adds up its part of the parameters'
    gradients: partial [programs, 3, D] holds those of weight, bias and x_bias (without x_bias [programs, 2, D])."""
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
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """`out`, and with `statistics` each row's mean and 1 / sqrt(var + eps), fp32 [2, rows]. No seed, no dropout."""
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
                x_rows,
                residual_rows,
                weight.contiguous(),
                bias.contiguous(),
                None if x_bias is None else x_bias.contiguous(),
                seed,
                out,
                saved,
                rows,
                x_rows.stride(0),
                residual_rows.stride(0),
                eps,
                threshold_of(dropout_p),
                1 / (1 - dropout_p),
                **tile,
                **LAUNCH,
            )
    return out, saved


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
    """dx, dresidual (empty where dx is the same) and fp32 [2 or 3, D], the gradients of weight, bias and x_bias.

    Args:
        needs: whether those of x, of residual, and of the parameters are asked for; one that is not is empty.
    """
    refuse_uninterpretable(grad=grad, x=x, residual=residual, weight=weight, x_bias=x_bias)
    channels = x.shape[-1]
    grad_rows, x_rows, residual_rows = as_rows(grad), as_rows(x), as_rows(residual)
    rows = x_rows.shape[0]
    needs_x, needs_residual = _written(x, residual, seed, needs)
    dx = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    dresidual = torch.empty(x.shape if needs_residual else (0,), dtype=residual.dtype, device=x.device)
    tile = row_tile("residual_layer_norm_backward", channels)
    tiles = triton.cdiv(rows, tile["BT"])
    programs, partial = tiles, None
    if needs[2]:
        # Without dropout 128 registers a thread or a little more, with it 170.
        programs = partial_sums(tiles, tile["num_warps"], x.device, resident_warps=16 if seed is None else 12)
        sums = 2 if x_bias is None else 3
        partial = torch.empty(programs, sums, channels, dtype=torch.float32, device=x.device)
    if programs:
        with on_device(x):
            residual_layer_norm_backward_kernel[(programs,)](
                grad_rows,
                x_rows,
                residual_rows,
                weight.contiguous(),
                None if x_bias is None else x_bias.contiguous(),
                seed,
                statistics,
                dx if needs_x else None,
                dresidual if needs_residual else None,
                partial,
                rows,
                grad_rows.stride(0),
                x_rows.stride(0),
                residual_rows.stride(0),
                threshold_of(dropout_p),
                1 / (1 - dropout_p),
                **tile,
                **LAUNCH,
            )
    return dx, dresidual, x.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)


def _differ(x: Tensor, residual: Tensor, seed: Tensor | None) -> bool:
    """Whether dx and dresidual differ."""
    return seed is not None or x.dtype != residual.dtype


def _written(x: Tensor, residual: Tensor, seed: Tensor | None, needs: list[bool]) -> tuple[bool, bool]:
    """Whether backward writes dx and dresidual: where they are the same, dx serves for both."""
    needs_x, needs_residual, _ = needs
    return (needs_x, needs_residual) if _differ(x, residual, seed) else (needs_x or needs_residual, False)


def dropout_mask(shape: torch.Size | tuple[int, ...], dropout_p: float, seed: int | Tensor) -> Tensor:
    """The mask that `residual_layer_norm` multiplies x [..., D] of this shape by, in PyTorch.

    Args:
        shape: of x.
        dropout_p: from 0 up to, not including, 1; rounded to a multiple of 2^-24.
        seed: an int64, or one as a tensor [], on whose device the mask will be.

    Returns: fp32 [..., D], 0 or 1 / (1 - dropout_p).
    """
    seed = torch.tensor(seed) if isinstance(seed, int) else seed
    row = torch.arange(torch.Size(shape[:-1]).numel(), device=seed.device)[:, None]
    quad = torch.arange(-(-shape[-1] // 4), device=seed.device)
    keep = keeps(seed, (quad, row, torch.zeros_like(row), torch.zeros_like(row)), dropout_p)  # [rows, D / 4, 4]
    return keep.flatten(-2)[:, : shape[-1]].float().div(1 - dropout_p).view(shape)


def _sum(x: Tensor, residual: Tensor, x_bias: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    """z in PyTorch."""
    z = x if x_bias is None else x + x_bias
    if seed is not None:
        z = z * dropout_mask(x.shape, dropout_p, seed).to(z.dtype)
    return z + residual


def _plain_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm`, which wants one dtype, in the wider of z's and weight's."""
    dtype = torch.promote_types(z.dtype, weight.dtype)
    return F.layer_norm(z.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)


@torch.library.custom_op("lion_kernels::residual_layer_norm", mutates_args=(), device_types="cuda")
def _residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    out, saved = launch_forward(x, residual, weight, bias, x_bias, seed, dropout_p, eps, statistics=True)
    assert saved is not None
    return out, saved


@_residual_layer_norm.register_kernel("cpu")
def _(x, residual, weight, bias, x_bias, seed, dropout_p, eps):
    if interpreting():
        out, saved = launch_forward(x, residual, weight, bias, x_bias, seed, dropout_p, eps, statistics=True)
        assert saved is not None
        return out, saved
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    z = _sum(x.to(wide), residual.to(wide), x_bias, seed, dropout_p)
    variance, mean = torch.var_mean(z, -1, correction=0)
    out = _plain_norm(z, weight, bias, eps).to(torch.promote_types(x.dtype, residual.dtype))
    return out.contiguous(), torch.stack([mean.flatten(), torch.rsqrt(variance + eps).flatten()]).float()


@_residual_layer_norm.register_fake
def _(x, residual, weight, bias, x_bias, seed, dropout_p, eps):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("lion_kernels::residual_layer_norm_backward", mutates_args=(), device_types="cuda")
def _residual_layer_norm_backward(
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
    return launch_backward(grad, x, residual, weight, x_bias, seed, statistics, dropout_p, needs)


@_residual_layer_norm_backward.register_kernel("cpu")
def _(grad, x, residual, weight, x_bias, seed, statistics, dropout_p, needs):
    if interpreting():
        return launch_backward(grad, x, residual, weight, x_bias, seed, statistics, dropout_p, needs)
    needs_x, needs_residual = _written(x, residual, seed, needs)
    mean, rstd = statistics.view(2, *x.shape[:-1], 1)
    n = (_sum(x.to(mean.dtype), residual.to(mean.dtype), x_bias, seed, dropout_p) - mean) * rstd
    dn = grad * weight.to(n.dtype)
    dz = (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True)) * rstd
    dx = dz if seed is None else dz * dropout_mask(x.shape, dropout_p, seed)
    nothing = parameters = dz.new_empty(0)
    if needs[2]:
        products = (grad * n, grad) if x_bias is None else (grad * n, grad, dx)
        parameters = torch.stack([product.flatten(0, -2).to(dz.dtype).sum(0) for product in products])
    return (
        (dx if needs_x else nothing).to(x.dtype, copy=True).contiguous(),
        (dz if needs_residual else nothing).to(residual.dtype, copy=True).contiguous(),
        parameters.float(),
    )


@_residual_layer_norm_backward.register_fake
def _(grad, x, residual, weight, x_bias, seed, statistics, dropout_p, needs):
    needs_x, needs_residual = _written(x, residual, seed, needs)
    sums = (2 if x_bias is None else 3, x.shape[-1]) if needs[2] else (0,)
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        residual.new_empty(x.shape if needs_residual else (0,)),
        x.new_empty(sums, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, x_bias, seed, dropout_p, _ = inputs
    ctx.save_for_backward(x, residual, weight, x_bias, seed, output[1])
    ctx.dropout_p, ctx.bias_dtype = dropout_p, bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, residual, weight, x_bias, seed, statistics = ctx.saved_tensors
    needs_x, needs_residual, *wanted = ctx.needs_input_grad[:5]
    dx, dresidual, sums = _residual_layer_norm_backward(
        grad, x, residual, weight, x_bias, seed, statistics, ctx.dropout_p, [needs_x, needs_residual, any(wanted)]
    )
    dresidual = dresidual if _differ(x, residual, seed) else dx
    dtypes = (weight.dtype, ctx.bias_dtype, None if x_bias is None else x_bias.dtype)
    parameters = (sums[i].to(dtypes[i]) if wanted[i] else None for i in range(3))
    return dx if needs_x else None, dresidual if needs_residual else None, *parameters, None, None, None


_residual_layer_norm.register_autograd(_differentiate, setup_context=_save)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`LayerNorm(dropout(x + x_bias) + residual)` over the last dimension.

    The kernels keep the sum in fp32, where "torch" rounds it to the inputs' dtype before it normalises.

    Args:
        x: [..., D], any leading dimensions, floating; the product of a linear layer without its bias.
        residual: [..., D] like x; its dtype may differ.
        weight, bias: [D] of the norm.
        eps: added to the variance.
        x_bias: [D] or None, the linear layer's bias.
        dropout_p: share of x + x_bias that is dropped, from 0 up to, not including, 1. A module that is not training
            passes 0.
        seed: of the dropout, an int64, or a tensor [] of one on x's device, which a CUDA graph reads at each replay;
            None draws one from PyTorch's generator, in a CUDA graph at each replay. The same seed drops the same values
            in every backend: those where `dropout_mask` is 0.
        backend: "auto", "triton" or "torch". The kernels take fp16, bf16 and fp32, and D up to 4096; for others "auto"
            is "torch".

    Returns:
        [..., D] in the wider dtype of x and residual.

    Raises:
        ValueError: a shape, dtype, device, probability or backend that does not fit; the message names the argument.
    """
    _check(x, residual, weight, bias, x_bias)
    check_dropout(dropout_p, seed, x.device)
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "x_bias": x_bias}
    if is_supported("residual_layer_norm", backend, tensors, MAX_CHANNELS):
        arguments = (x, residual, weight, bias, x_bias, seed_tensor(seed, dropout_p, x.device), dropout_p, eps)
        if needs_dispatch(*tensors.values()):
            return _residual_layer_norm(*arguments)[0]
        return launch_forward(*arguments, statistics=False)[0]
    if dropout_p > 0 and seed is None:
        z = F.dropout(x if x_bias is None else x + x_bias, dropout_p) + residual
    else:
        z = _sum(x, residual, x_bias, seed_tensor(seed, dropout_p, x.device), dropout_p)
    return _plain_norm(z, weight, bias, eps).to(torch.promote_types(x.dtype, residual.dtype))


def _check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [..., D], got {x.dtype} {list(x.shape)}")
    if residual.shape != x.shape or not residual.is_floating_point():
        raise ValueError(
            f"residual: expected floating {list(x.shape)} (from x), got {residual.dtype} {list(residual.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if tensor is not None and (tensor.shape != x.shape[-1:] or not tensor.is_floating_point()):
            raise ValueError(
                f"{name}: expected floating [{x.shape[-1]}] (D from x), got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (from x), got {tensor.device}")


def cost(rows: int, channels: int, dtype: torch.dtype, *, dropout: bool = False) -> tuple[Cost, Cost]:
    """What forward and backward (of every input) cannot avoid, for x [rows, channels] with everything of one dtype.

    Forward reads x, residual, weight, bias and x_bias, and writes out. Backward reads the gradient, x, residual,
    weight, x_bias and the statistics, and writes dx and the parameters' gradients, and with dropout dresidual, which
    is otherwise dx. Making the mask is not counted.
    """
    values = rows * channels
    return (
        Cost(dtype.itemsize * (3 * values + 3 * channels), 9 * values),
        Cost(dtype.itemsize * ((5 if dropout else 4) * values + 5 * channels) + 8 * rows, 18 * values),
    )


def kernel_specs() -> list[KernelSpec]:
    kinds = {
        "rows": "i32",
        "eps": "fp32",
        "threshold": "i32",
        "scale": "fp32",
        "p_seed": "*i64",
        "p_statistics": "*fp32",
        "p_partial": "*fp32",
    }
    widths = tuple(width for width in WIDTHS if width <= MAX_CHANNELS)
    variants = {"without dropout": ("p_seed", "p_dresidual"), "with dropout": ()}
    return [
        *norm_specs(residual_layer_norm_forward_kernel, widths, kinds, variants),
        *norm_specs(residual_layer_norm_backward_kernel, widths, kinds, variants),
    ]
