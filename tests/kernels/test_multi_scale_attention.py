"""Tests of `multi_scale_attention` beyond `test_contract.py`: head dimensions, masks, dropout, tiles and cost."""

import pytest
import torch
from torch import Tensor

import lion_reference
from lion_fast.check import cases
from lion_kernels.attention.plain import dropout_mask
from lion_kernels.attention.sizes import split_head_dim, tail
from lion_kernels.core.dropout import philox
from lion_kernels.multi_scale_attention import cost, multi_scale_attention
from tests.kernels.contract import expect_close, make, reference, run
from tests.rounding import relative_error

SEED = 2**40 + 12345


@pytest.mark.parametrize("head_dim", [32, 48, 56, 104, 112, 120])
def test_head_dims_that_no_other_case_has(head_dim: int, device: torch.device) -> None:
    case = cases.maps_attention(3, (18,), head_dim, batch=1, heads=1)
    tensors = make(case, device=device)
    expect_close(run(case, tensors, "triton"), reference(case, tensors))


def test_one_mask_for_all_maps_of_any_dtype(device: torch.device) -> None:
    """A single mask applies to all maps; in a list, None leaves a map without a mask."""
    q, k = (torch.randn(2, length, 1, 16, device=device) for length in (5, 12))
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)).to(device) > 0.5

    def attend(mask: Tensor | list[Tensor | None] | None) -> Tensor:
        return multi_scale_attention(q, [k, k], [k, k], key_padding_mask=mask, backend="triton")

    expected = attend([mask, mask])
    for dtype in (torch.bool, torch.int64, torch.float32):
        assert torch.equal(attend(mask.to(dtype)), expected)
    assert torch.equal(attend([mask, None]), torch.stack([expected[:, :, 0], attend(None)[:, :, 1]], 2))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_query_that_attends_nothing_gives_zeros(backend: str, device: torch.device) -> None:
    case = cases.maps_attention(5, (12,), 16, mask=True)
    tensors = make(case, device=device)
    out = multi_scale_attention(**case.arguments(tensors), backend=backend)
    assert (out[0] == 0).all()
    leaves = [value for value in tensors.values() if value.requires_grad]
    for gradient in torch.autograd.grad(out.square().sum() + out.sum(), leaves):
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).any()


def test_dropout_mask_is_fair() -> None:
    mask = dropout_mask(3, 2, 50, 211, 0.2, SEED)
    kept = mask > 0
    assert torch.equal(mask.unique(), torch.tensor([0.0, 1.25]))
    assert kept.shape == (3, 2, 50, 211)
    # 63300 draws: the share kept has a standard deviation of 0.0016, the share of equal neighbours one of 0.005.
    assert abs(kept.double().mean().item() - 0.8) < 0.008
    for a, b in ((kept[:-1], kept[1:]), (kept[:, :1], kept[:, 1:]), (kept[:, :, :-1], kept[:, :, 1:])):
        assert abs((a == b).double().mean().item() - (0.64 + 0.04)) < 0.015
    assert abs((kept[..., :-1] == kept[..., 1:]).double().mean().item() - 0.68) < 0.015
    assert not torch.equal(mask, dropout_mask(3, 2, 50, 211, 0.2, SEED, map_index=1))
    assert not torch.equal(mask, dropout_mask(3, 2, 50, 211, 0.2, SEED & 0xFFFFFFFF))


def test_dropout_mask_is_philox() -> None:
    """Compare with known answers of Philox4x32-10 (Random123's kat_vectors)."""
    zeros = (torch.zeros((), dtype=torch.int64),) * 4
    assert [int(x) for x in philox(0, zeros)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = (torch.tensor(0xFFFFFFFF),) * 4
    assert [int(x) for x in philox(2**64 - 1, ones)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    ("head_dim", "pieces"), [(8, (16, 0)), (40, (32, 16)), (64, (64, 0)), (88, (64, 32)), (104, (128, 0))]
)
def test_head_dims_are_split(head_dim: int, pieces: tuple[int, int]) -> None:
    assert split_head_dim(head_dim) == pieces


def test_a_short_last_tile_is_narrow() -> None:
    assert [tail(length, 64) for length in (0, 64, 256, 257, 272, 273, 1, 17)] == [0, 64, 64, 16, 16, 64, 16, 64]


def test_cost_is_the_formula() -> None:
    """B=64, H=16, L=257, Dh=88 in bf16: 185 MB and 24 GFLOP forward."""
    q = torch.empty(64, 257, 16, 88, dtype=torch.bfloat16, device="meta")
    forward, backward = cost(q, [q])
    assert forward.bytes == 4 * q.numel() * 2
    assert forward.flops == 4 * 64 * 16 * 257 * 257 * 88
    assert backward.flops == 2.5 * forward.flops


@pytest.mark.gpu
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
    exact = lion_reference.multi_scale_attention(q.double(), [k.double()], [v.double()])
    plain = lion_reference.multi_scale_attention(q, [k], [v])
    assert relative_error(outs[0], exact) < 2 * relative_error(plain, exact) + 2**-9
