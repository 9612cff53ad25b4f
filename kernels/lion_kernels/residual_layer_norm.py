"""BERT's post-norm step: bias, dropout, residual and LayerNorm (Devlin et al., arXiv 1810.04805).

    z = (x + x_bias) * mask + residual                  mask: 0 with probability p, else 1 / (1 - p)
    n = (z - mean(z)) / sqrt(var(z) + eps)              in fp32
    out = n * weight + bias

    dn = g * weight,   dz = (dn - mean(dn) - n * mean(dn * n)) / sqrt(var(z) + eps)
    dresidual = dz,   dx = dz * mask
    dweight, dbias, dx_bias = sums over rows of g * n, g, dx

Forward saves x, residual, and each row's mean and 1 / sqrt(var + eps). Backward recomputes z: saving it would move as
many bytes, and in half precision would round it.

The mask depends on (seed, row, column) alone (`lion_kernels.core.dropout`), so backward recomputes it, and
`dropout_mask` returns it as a tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels.core import operator
from lion_kernels.core.arguments import FLOATING, as_positive, check_tensors
from lion_kernels.core.backend import choose_backend, needs_dispatch
from lion_kernels.core.cost import Cost
from lion_kernels.core.dropout import check_dropout, keeps, seed_tensor
from lion_kernels.core.layer_norm import (
    fake_backward,
    fake_forward,
    gradients_differ,
    launch_backward,
    launch_forward,
    residual_layer_norm_backward_kernel,
    residual_layer_norm_forward_kernel,
    written_gradients,
)
from lion_kernels.core.rowwise import WIDTHS, norm_specs, why_unsupported
from lion_kernels.core.specs import KernelSpec

MAX_CHANNELS = 4096  # one program holds a row and its part of three sums in registers


def dropout_mask(shape: torch.Size | tuple[int, ...], dropout_p: float, seed: int | Tensor) -> Tensor:
    """Return the mask that `residual_layer_norm` multiplies x [..., D] by, computed in PyTorch.

    Args:
        shape: of x.
        dropout_p: in [0, 1); rounded to a multiple of 2^-24.
        seed: an int64 or an int64 tensor [], whose device the mask is created on.

    Returns: fp32 [..., D], 0 or 1 / (1 - dropout_p).
    """
    seed = torch.tensor(seed) if isinstance(seed, int) else seed
    row = torch.arange(torch.Size(shape[:-1]).numel(), device=seed.device)[:, None]
    quad = torch.arange(-(-shape[-1] // 4), device=seed.device)
    keep = keeps(seed, (quad, row, torch.zeros_like(row), torch.zeros_like(row)), dropout_p)  # [rows, D / 4, 4]
    return keep.flatten(-2)[:, : shape[-1]].float().div(1 - dropout_p).view(shape)


def _sum(x: Tensor, residual: Tensor, x_bias: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Compute z in PyTorch."""
    z = x if x_bias is None else x + x_bias
    if seed is not None:
        z = z * dropout_mask(x.shape, dropout_p, seed).to(z.dtype)
    return z + residual


def _norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Apply `F.layer_norm`, which requires a single dtype, in the wider of z's and weight's."""
    dtype = torch.promote_types(z.dtype, weight.dtype)
    return F.layer_norm(z.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)


def plain_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `launch_forward` in PyTorch."""
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    z = _sum(x.to(wide), residual.to(wide), x_bias, seed, dropout_p)
    variance, mean = torch.var_mean(z, -1, correction=0)
    out = _norm(z, weight, bias, eps).to(torch.promote_types(x.dtype, residual.dtype))
    return out.contiguous(), torch.stack([mean.flatten(), torch.rsqrt(variance + eps).flatten()]).float()


def plain_backward(
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
    needs_x, needs_residual = written_gradients(x, residual, seed, needs)
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, x_bias, seed, dropout_p, _ = inputs
    ctx.save_for_backward(x, residual, weight, x_bias, seed, output[1])
    ctx.dropout_p, ctx.bias_dtype = dropout_p, bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, residual, weight, x_bias, seed, statistics = ctx.saved_tensors
    needs_x, needs_residual, *wanted = ctx.needs_input_grad[:5]
    dx, dresidual, sums = backward_op(
        grad, x, residual, weight, x_bias, seed, statistics, ctx.dropout_p, [needs_x, needs_residual, any(wanted)]
    )
    dresidual = dresidual if gradients_differ(x, residual, seed) else dx
    dtypes = (weight.dtype, ctx.bias_dtype, None if x_bias is None else x_bias.dtype)
    parameters = (sums[i].to(dtypes[i]) if wanted[i] else None for i in range(3))
    return dx if needs_x else None, dresidual if needs_residual else None, *parameters, None, None, None


def cost(rows: int, channels: int, dtype: torch.dtype, *, dropout: bool = False) -> tuple[Cost, Cost]:
    """Return the minimal cost of forward and backward (for every input) for x [rows, channels], all in one dtype.

    Forward reads x, residual, weight, bias and x_bias, and writes out. Backward reads the gradient, x, residual,
    weight, x_bias and the statistics. It writes dx, the parameters' gradients and, with dropout, dresidual, which is dx
    otherwise. The computation of the mask is not counted.
    """
    values = rows * channels
    return (
        Cost(dtype.itemsize * (3 * values + 3 * channels), 9 * values),
        Cost(dtype.itemsize * ((5 if dropout else 4) * values + 5 * channels) + 8 * rows, 18 * values),
    )


def kernel_specs() -> list[KernelSpec]:
    numbers = {"rows": "i32", "threshold": "i32", "eps": "fp32", "scale": "fp32"}
    kinds = {**numbers, "p_seed": "*i64", "p_statistics": "*fp32", "p_partial": "*fp32"}
    widths = tuple(width for width in WIDTHS if width <= MAX_CHANNELS)
    variants = {"without dropout": ("p_seed", "p_dresidual"), "with dropout": ()}
    return [
        *norm_specs(residual_layer_norm_forward_kernel, widths, kinds, variants),
        *norm_specs(residual_layer_norm_backward_kernel, widths, kinds, variants),
    ]


backward_op = operator.define(
    "residual_layer_norm_backward", launch=launch_backward, plain=plain_backward, fake=fake_backward
)
forward_op = operator.define(
    "residual_layer_norm",
    launch=launch_forward,
    plain=plain_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_differentiate,
    cost=cost,
    kernel_specs=kernel_specs,
)


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
    """Compute `LayerNorm(dropout(x + x_bias) + residual)` over the last dimension.

    The kernels keep the sum in fp32; "torch" rounds it to the inputs' dtype before it normalises.

    Args:
        x: [..., D], floating, the output of a linear layer without its bias; any dimension may be 0.
        residual: [..., D] like x; its dtype may differ.
        weight, bias: [D] of the norm.
        eps: positive, added to the variance.
        x_bias: [D] or None, the linear layer's bias.
        dropout_p: probability of dropping a value of x + x_bias, in [0, 1); pass 0 outside training.
        seed: of the dropout, an int64 or an int64 tensor [] on x's device, which a CUDA graph reads at each replay.
            None draws a seed from PyTorch's generator, in a CUDA graph at each replay. The same seed drops the same
            values in every backend, those where `dropout_mask` is 0.
        backend: "auto", "triton" or "torch". The kernels support fp16, bf16 and fp32, and D up to 4096; otherwise
            "auto" is "torch".

    Returns:
        [..., D] in the wider dtype of x and residual.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
    """
    _check(x, residual, weight, bias, x_bias)
    eps = as_positive("eps", eps)
    dropout_p = check_dropout(dropout_p, seed, "x", x)
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "x_bias": x_bias}
    unsupported = why_unsupported(tensors, MAX_CHANNELS)
    if choose_backend(backend, "residual_layer_norm", x.device, unsupported) == "triton" and x.shape[-1]:
        arguments = (x, residual, weight, bias, x_bias, seed_tensor(seed, dropout_p, x.device), dropout_p, eps)
        if needs_dispatch(*tensors.values()):
            return forward_op(*arguments)[0]
        return launch_forward(*arguments, statistics=False)[0]
    if dropout_p > 0 and seed is None:
        z = F.dropout(x if x_bias is None else x + x_bias, dropout_p) + residual
    else:
        z = _sum(x, residual, x_bias, seed_tensor(seed, dropout_p, x.device), dropout_p)
    return _norm(z, weight, bias, eps).to(torch.promote_types(x.dtype, residual.dtype))


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None) -> None:
    check_tensors({"x": x, "residual": residual, "weight": weight, "bias": bias}, {"x_bias": x_bias})
    if x.dim() == 0 or x.dtype not in FLOATING:
        raise ValueError(f"x: expected floating [..., D], got {x.dtype} {list(x.shape)}")
    if residual.shape != x.shape or residual.dtype not in FLOATING:
        raise ValueError(
            f"residual: expected floating {list(x.shape)} (from x), got {residual.dtype} {list(residual.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if tensor is not None and (tensor.shape != x.shape[-1:] or tensor.dtype not in FLOATING):
            raise ValueError(
                f"{name}: expected floating [{x.shape[-1]}] (D from x), got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (from x), got {tensor.device}")
