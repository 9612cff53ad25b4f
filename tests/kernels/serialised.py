"""Print the gate's complaints about one product, with its narrow last step after the loop and before it.

Run this without `TRITON_INTERPRET`.
"""

# pyright: reportArgumentType=false

import json

import triton
import triton.language as tl

from lion_kernels.aot.compile import KernelSpec, compile_kernel
from lion_kernels.aot.gate import check


@triton.jit
def step(b_out, b_q, p_k, p_v, first, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Return b_out + exp2(q k^T) v for COLUMNS keys."""
    o = (first + tl.arange(0, COLUMNS))[:, None] * D + tl.arange(0, D)[None, :]
    b_v = tl.load(p_v + o)
    return tl.dot(tl.math.exp2(tl.dot(b_q, tl.trans(tl.load(p_k + o)))).to(b_v.dtype), b_v, b_out)


@triton.jit
def attend(p_q, p_k, p_v, p_out, tiles, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """Compute exp2(q k^T) v; the last 16 keys come before the loop if FIRST, otherwise after it."""
    o = tl.arange(0, BM)[:, None] * D + tl.arange(0, D)[None, :]
    b_q = tl.load(p_q + o)
    b_out = tl.zeros([BM, D], tl.float32)
    if FIRST:
        b_out = step(b_out, b_q, p_k, p_v, tiles * BN, 16, D)
    for i_n in range(0, tiles):
        b_out = step(b_out, b_q, p_k, p_v, i_n * BN, BN, D)
    if not FIRST:
        b_out = step(b_out, b_q, p_k, p_v, tiles * BN, 16, D)
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty))


def complaints(first: bool) -> list[str]:
    spec = KernelSpec(
        name="attend",
        kernel=attend,
        signature={**dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), "*bf16"), "tiles": "i32"},
        constexprs={"FIRST": first, "BM": 128, "BN": 64, "D": 64},
        num_warps=8,
        num_stages=2,
        matrix=True,
    )
    return [complaint.kind for complaint in check(compile_kernel(spec, "sm_90"), spec)]


if __name__ == "__main__":
    print(json.dumps({"last": complaints(False), "first": complaints(True)}))
