"""Attention tests that need a GPU: more than 2**31 elements, and strided inputs in bf16."""

import pytest
import torch
from torch import Tensor

from lion_kernels import multi_scale_attention, relative_bias_attention
from lion_reference import multi_scale_attention as reference
from tests.rounding import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("operator", ["multi_scale_attention", "relative_bias_attention"])
def test_more_than_2_to_the_31_elements(operator: str, device: torch.device) -> None:
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


@pytest.mark.parametrize("layout", ["one projection", "heads first", "every other token", "a shifted start"])
def test_strided_inputs_in_bf16(layout: str, device: torch.device) -> None:
    """Strided inputs give the same bits as contiguous ones, forward and backward."""
    batch, length, heads, head_dim = 2, 257, 16, 88
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).bfloat16()

    if layout == "one projection":
        q, k, v = randn(batch, length, 3, heads, head_dim).unbind(2)
    elif layout == "heads first":
        q, k, v = (randn(batch, heads, length, head_dim).transpose(1, 2) for _ in range(3))
    elif layout == "every other token":
        q, k, v = (randn(batch, 2 * length, heads, head_dim)[:, ::2] for _ in range(3))
    else:  # no 16-byte access is aligned
        flat = randn(3, 1 + batch * length * heads * head_dim)[:, 1:]
        q, k, v = (row.view(batch, length, heads, head_dim) for row in flat)
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    packed = [x.detach().contiguous().clone().requires_grad_() for x in (q, k, v)]
    grad = randn(batch, length, heads, head_dim)
    outs = [multi_scale_attention(q, [k], [v], backend="triton") for q, k, v in (given, packed)]
    assert torch.equal(*outs)
    gradients = [torch.autograd.grad(out, leaves, grad) for out, leaves in zip(outs, (given, packed), strict=True)]
    for name, got, expected in zip("qkv", *gradients, strict=True):
        assert torch.equal(got, expected), name
    exact = reference(q.double(), [k.double()], [v.double()])
    plain = reference(q, [k], [v])
    assert relative_error(outs[0], exact) < 2 * relative_error(plain, exact) + 2**-9
