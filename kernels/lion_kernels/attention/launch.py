"""Launches of the attention kernels, and the checks that the attention operators share."""

# Launches pass plain values as constexpr arguments, and have additional keywords.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_kernels.attention.backward import attention_backward_keys, attention_backward_queries
from lion_kernels.attention.forward import attention_forward
from lion_kernels.attention.sizes import NARROW, split_head_dim, tail, tile_sizes
from lion_kernels.core.arguments import FLOATING, INTEGERS, check_floating
from lion_kernels.core.backend import DTYPES, LAUNCH, autocast_dtype, dot_precision, on_device, triton, values_on_host
from lion_kernels.core.dropout import threshold_of


class Attention(NamedTuple):
    """The operands of one attention, in forward and backward.

    Attributes:
        q: [B, L, H, Dh], any strides with a contiguous last dimension.
        k, v: [B, M, H, Dh], likewise.
        scale: factor of the scores.
        mask: contiguous bool [B, M], true where a key may be attended, or None.
        bias: [H, 2 * reach + 1], contiguous; added to the scores by distance.
        causal: whether a query may attend only keys up to its own position; the queries are the last positions.
        seed: of the dropout, int64 [] on q's device; None without dropout.
        i_map: index of the map; it enters the dropout's counter.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None = None
    bias: Tensor | None = None
    reach: int = 0
    causal: bool = False
    dropout_p: float = 0.0
    seed: Tensor | None = None
    i_map: int = 0

    @property
    def heads_in_batch(self) -> int:
        return self.q.shape[0] * self.q.shape[2]

    def tile_sizes(self, kernel: str) -> dict[str, int]:
        length = self.k.shape[1] if kernel == "backward_keys" else self.q.shape[1]
        return tile_sizes(kernel, self.q, length, bias=self.bias is not None, dropout=self.seed is not None)

    def arguments(self, kernel: str) -> dict[str, Any]:
        """Return the arguments common to all kernels, by name."""
        unit = _stride_unit(self.q, self.k, self.v)
        strides = {
            f"stride_{name}_{dim}": x.stride(i) // unit
            for name, x in (("q", self.q), ("k", self.k), ("v", self.v))
            for i, dim in enumerate(("batch", "row", "head"))
        }
        piece1, piece2 = split_head_dim(self.q.shape[-1], kernel)
        return {
            "p_q": self.q,
            "p_k": self.k,
            "p_v": self.v,
            "p_mask": None if self.mask is None else self.mask.view(torch.uint8),
            "p_bias": self.bias,
            "p_seed": self.seed,
            **strides,
            "queries": self.q.shape[1],
            "keys": self.k.shape[1],
            "heads": self.q.shape[2],
            "reach": self.reach,
            "i_map": self.i_map,
            "scale": self.scale,
            "threshold": threshold_of(self.dropout_p),
            "rescale": 1.0 / (1.0 - self.dropout_p),
            "HEAD_DIM": self.q.shape[-1],
            "D1": piece1,
            "D2": piece2,
            "UNIT": unit,
            "CAUSAL": self.causal,
            "PRECISION": dot_precision(self.q.dtype),
        }


def _stride_unit(*tensors: Tensor) -> int:
    """Return the number of values in 16 bytes if it divides every stride, else 1.

    Triton detects multiples of 16, not of 8: a head stride of 88 fp16 values must be passed as 11 units.
    """
    unit = 16 // tensors[0].dtype.itemsize
    return unit if all(stride % unit == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def launch_forward(attention: Attention, out: Tensor, lse: Tensor | None) -> None:
    """Write the attention to `out` and, unless it is None, the base-2 logarithm of each softmax's sum to `lse`.

    Args:
        out: [B, L, H, Dh], contiguous except between rows.
        lse: [B, H, L] in fp32.
    """
    queries, keys = attention.q.shape[1], attention.k.shape[1]
    if not (out.numel() and keys):
        out.zero_()
        if lse is not None:
            lse.fill_(math.inf)  # as of a query that may attend no key
        return
    sizes = attention.tile_sizes("forward")
    with on_device(out):
        attention_forward[(triton.cdiv(queries, sizes["BM"]) * attention.heads_in_batch,)](
            p_out=out,
            p_lse=lse,
            stride_out_row=out.stride(1) // 8,
            ROW_TAIL=_narrow_tail(queries, sizes["BM"]),
            COLUMN_TAIL=0 if attention.causal else tail(keys, sizes["BN"]),
            **attention.arguments("forward"),
            **sizes,
            **LAUNCH,
        )


def launch_backward(
    attention: Attention,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    gate: Tensor | None = None,
    previous: Tensor | None = None,
) -> None:
    """Write those of `delta`, dq, dk and dv that are not None; one kernel computes the first two, another the last two.

    Args:
        grad: of `out`, with any layout that `out` may have.
        out, lse: as written by `launch_forward`.
        delta: [B, H, L] in fp32; required for dq, dk and the gradients of `gate` and bias.
        dq: [B, L, H, Dh], contiguous.
        dk, dv: [B, M, H, Dh], contiguous.
        gate: [S], the weights of the maps' outputs.
        previous: added to dq, in the same layout.
    """
    queries, keys = attention.q.shape[1], attention.k.shape[1]
    if not (out.numel() and keys):
        for gradient in (delta, dk, dv):
            if gradient is not None:
                gradient.zero_()
        if dq is not None:
            dq.zero_() if previous is None else dq.copy_(previous)
        return
    if delta is not None:
        sizes = attention.tile_sizes("backward_queries")
        with on_device(grad):
            attention_backward_queries[(triton.cdiv(queries, sizes["BM"]) * attention.heads_in_batch,)](
                p_gate=gate,
                p_out=out,
                p_grad=grad,
                p_lse=lse,
                p_delta=delta,
                p_previous=previous,
                p_dq=dq,
                stride_out_row=out.stride(1) // 8,
                stride_grad_row=grad.stride(1) // 8,
                ROW_TAIL=_narrow_tail(queries, sizes["BM"]),
                COLUMN_TAIL=0 if attention.causal else tail(keys, sizes["BN"]),
                **attention.arguments("backward_queries"),
                **sizes,
                **LAUNCH,
            )
    if dk is not None or dv is not None:
        sizes = attention.tile_sizes("backward_keys")
        with on_device(grad):
            attention_backward_keys[(triton.cdiv(keys, sizes["BN"]) * attention.heads_in_batch,)](
                p_gate=gate,
                p_grad=grad,
                p_lse=lse,
                p_delta=delta,
                p_dk=dk,
                p_dv=dv,
                stride_grad_row=grad.stride(1) // 8,
                ROW_TAIL=tail(queries, sizes["BM"]),
                COLUMN_TAIL=_narrow_tail(keys, sizes["BN"]),
                **attention.arguments("backward_keys"),
                **sizes,
                **LAUNCH,
            )


def _narrow_tail(length: int, tile: int) -> int:
    """Return `NARROW` if the last tile of `length` should be that narrow, else 0."""
    return NARROW if tile > NARROW and tail(length, tile) == NARROW else 0


def why_unsupported(q: Tensor) -> str | None:
    """Return why the kernels do not support the dtype and head dimension of `q`; None if they do."""
    if q.dtype not in DTYPES:
        return f"q: expected float16, bfloat16 or float32 for backend 'triton', got {q.dtype}"
    if q.shape[-1] not in range(8, 129, 8):
        return f"q: expected Dh a multiple of 8 up to 128 for backend 'triton', got {list(q.shape)}"
    return None


def check_queries(q: Tensor) -> None:
    """Raise ValueError if `q` is no floating [B, L, H, Dh]."""
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, L, H, Dh], got {list(q.shape)}")
    check_floating("q", q)
    if not q.shape[3]:
        raise ValueError(f"q: expected [B, L, H, Dh] with Dh at least 1, got {list(q.shape)}")


def check_alike(q: Tensor, others: dict[str, Tensor]) -> None:
    """Raise ValueError for a tensor on another device than q or of another dtype.

    Under autocast, which casts them, it may be any floating dtype.
    """
    device, dtype = q.device, q.dtype
    for name, x in others.items():
        if x.device != device:
            raise ValueError(f"{name}: expected on {device} (from q), got {x.device}")
        if x.dtype != dtype:
            if autocast_dtype(q) is None:
                raise ValueError(f"{name}: expected {dtype} (from q), got {x.dtype}")
            check_floating(name, x)


def check_mask(name: str, mask: Tensor) -> None:
    """Raise ValueError for a mask of keys that is complex or, as far as its values are on the host, to be added."""
    if mask.dtype == torch.bool or mask.dtype in INTEGERS:
        return
    if mask.dtype not in FLOATING:
        raise ValueError(f"{name}: expected bool, integers or a floating dtype, got {mask.dtype}")
    if values_on_host(mask) and bool((mask < 0).any()):
        raise ValueError(f"{name}: expected nonzero where a key may be attended, got negative values, as of a bias")


def check_device(q: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raise ValueError for a tensor on another device than q."""
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} (from q), got {x.device}")
