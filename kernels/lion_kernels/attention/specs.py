"""The compiled configurations of the attention kernels, for the ahead-of-time report."""

from typing import Any

import torch

from lion_kernels.attention.backward import attention_backward_keys, attention_backward_queries
from lion_kernels.attention.forward import attention_forward
from lion_kernels.attention.sizes import NARROW, default_sizes, split_head_dim
from lion_kernels.core.specs import KernelSpec

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def attention_specs(
    operator: str,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rows: str = "many",
    mask: bool = False,
    bias: bool = False,
    gate: bool = False,
    causal: bool = False,
    dropout: bool = False,
    compact: bool = False,
    frozen: str | None = None,
) -> list[KernelSpec]:
    """Return the three kernels as `launch_forward` and `launch_backward` launch them, for the ahead-of-time report.

    Args:
        frozen: "q", "k" or "v": only the kernel that writes its gradient, in the variant without this gradient.
    """
    optional = {"p_mask": mask, "p_bias": bias, "p_seed": dropout, "p_gate": gate, "p_previous": gate}
    used = {**optional, f"p_d{frozen}": False}
    features = {"mask": mask, "bias": bias, "gate": gate, "causal": causal, "dropout": dropout, "compact": compact}
    suffix = "".join(f" {name}" for name, on in features.items() if on) + (f" frozen {frozen}" if frozen else "")
    kernels = {
        "forward": attention_forward,
        "backward_queries": attention_backward_queries,
        "backward_keys": attention_backward_keys,
    }
    out = []
    for kernel, function in kernels.items():
        if frozen and f"p_d{frozen}" not in function.arg_names:
            continue
        width = sum(split_head_dim(head_dim, kernel))
        sizes = default_sizes(kernel, dtype, width, rows, bias=bias, dropout=dropout, compact=compact)
        tile_m, tile_n = sizes["BM"], sizes["BN"]
        constexprs = {
            **{name: None for name, on in used.items() if not on and name in function.arg_names},
            "BM": tile_m,
            "BN": tile_n,
            "ROW_TAIL": NARROW if tile_m > NARROW or kernel == "backward_keys" else 0,
            "COLUMN_TAIL": (NARROW if tile_n > NARROW else 0) if kernel == "backward_keys" else 0 if causal else NARROW,
            "CAUSAL": causal,
        }
        out.append(
            kernel_spec(
                f"{operator} {kernel} {_KINDS[dtype]} Dh={head_dim} {rows} {tile_m}x{tile_n}{suffix}",
                kernel,
                function,
                head_dim,
                dtype,
                sizes,
                constexprs,
                {"p_dq": "*fp32"} if gate else {},
                # Without dq, the kernel only computes delta, without a matrix product.
                product_rows=0 if frozen == "q" else tile_n if kernel == "backward_keys" else tile_m,
                compact=compact,
            )
        )
    return out


def kernel_spec(
    name: str,
    kernel: str,
    function: Any,
    head_dim: int,
    dtype: torch.dtype,
    sizes: dict[str, int],
    constexprs: dict[str, Any],
    kinds: dict[str, str],
    *,
    product_rows: int,
    compact: bool,
) -> KernelSpec:
    """Return the spec of `function` as launched with the arguments of an `Attention`.

    Args:
        kernel: its name in `split_head_dim`.
        constexprs: those that differ between kernels.
        kinds: types of the arguments whose type differs between kernels.
        product_rows: rows of the matrix products.
    """
    piece1, piece2 = split_head_dim(head_dim, kernel)
    kinds = {
        **dict.fromkeys(("scale", "rescale"), "fp32"),
        **dict.fromkeys(("p_lse", "p_delta", "p_previous"), "*fp32"),
        "p_mask": "*u8",
        "p_seed": "*i64",
        **kinds,
    }
    return KernelSpec(
        name=name,
        kernel=function,
        signature={x: kinds.get(x, f"*{_KINDS[dtype]}" if x.startswith("p_") else "i32") for x in function.arg_names},
        constexprs={
            "HEAD_DIM": head_dim,
            "D1": piece1,
            "D2": piece2,
            "UNIT": 16 // dtype.itemsize,
            "PRECISION": "ieee",
            **constexprs,
        },
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
        # Warp groups multiply at least 64 rows, and no matrix unit multiplies fp32 without rounding.
        matrix=dtype != torch.float32 and product_rows >= 64,
        compact=compact,
    )
