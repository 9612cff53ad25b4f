"""More than 2**31 elements, beyond the reach of 32-bit offsets: equal rows give equal results. All need a GPU."""

import pytest
import torch

from lion_fast.check import cases
from lion_kernels import (
    assemble_inputs,
    gated_gelu,
    mixture_of_adapters,
    multi_scale_attention,
    relative_bias_attention,
    residual_layer_norm,
    rms_norm,
)
from tests.kernels.contract import make
from tests.rounding import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("memory")]


@pytest.mark.parametrize("operator", ["multi_scale_attention", "relative_bias_attention"])
def test_attention(operator: str, device: torch.device) -> None:
    heads, head_dim, length = (16, 88, 257) if operator == "multi_scale_attention" else (32, 64, 417)
    batch = 2**31 // (length * heads * head_dim) + 2
    q, k, v = (
        torch.randn(1, length, heads, head_dim, device=device, dtype=torch.bfloat16)
        .expand(batch, -1, -1, -1)
        .contiguous()
        .requires_grad_()
        for _ in range(3)
    )
    if operator == "multi_scale_attention":
        out = multi_scale_attention(q, [k], [v], backend="triton")
    else:
        table = torch.randn(32, heads, device=device, dtype=torch.bfloat16)
        out = relative_bias_attention(q, k, v, table, backend="triton")
    assert out.numel() > 2**31
    assert torch.equal(out[-1], out[0])
    assert out[0].isfinite().all()
    for gradient in torch.autograd.grad(out, (q, k, v), out.detach()):
        assert torch.equal(gradient[-1], gradient[0])
        assert gradient[0].isfinite().all()


@pytest.mark.parametrize("operator", ["residual_layer_norm", "rms_norm", "gated_gelu"])
def test_rows(operator: str, device: torch.device) -> None:
    row = torch.randn(4096, device=device, dtype=torch.bfloat16)
    x = row.expand(2**19 + 3, 4096).contiguous().requires_grad_()
    if operator == "residual_layer_norm":
        out = residual_layer_norm(x, x, row, row, 1e-12, backend="triton")
    elif operator == "rms_norm":
        out = rms_norm(x, row, 1e-6, backend="triton")
    else:
        out = gated_gelu(x, x, backend="triton")
    assert torch.equal(out[-1], out[0])
    (dx,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(dx[-1], dx[0])


def test_mixture_of_adapters(device: torch.device) -> None:
    small = make(cases.adapters("dense for all", (1, 100), 2048, 2, 16), torch.bfloat16, device)
    del small["residual"]
    x = torch.zeros(2**31 // 2048 + 100, 2048, dtype=torch.bfloat16, device=device)
    x[-100:] = small["x"].detach()[0]
    with torch.no_grad():
        out = mixture_of_adapters(**small | {"x": x}, backend="triton")
        expected = mixture_of_adapters(**small, backend="triton")
    assert relative_error(out[-100:], expected[0]) < 2**-8


def test_assemble_inputs(device: torch.device) -> None:
    case = cases.assemble(1, 33, 33, 4096, 50)
    one = {name: value.detach() for name, value in make(case, torch.bfloat16, device).items()}
    many = one | {name: one[name].repeat_interleave(2**13, 0) for name in ("prefix", "input_ids")}
    out = assemble_inputs(**case.arguments(many), backend="triton")
    assert out.numel() > 2**31
    assert torch.equal(out[-1:], assemble_inputs(**case.arguments(one), backend="torch"))
