"""Dropout whose mask is a function of a seed and of places, so that backward, and a test, can have it again.

Philox4x32-10 (Salmon et al., SC 2011) answers a counter of four words with four random ones: one each for four
neighbouring columns. A value is kept where the high 24 bits of its word reach 2^24 * dropout_p.

Kernels read the seed from memory: a CUDA graph that is replayed finds there what was written, or drawn, since.
"""

import torch
from torch import Tensor

from lion_kernels.core.backend import tl, triton

RANDOM_BITS = 24  # of each word: dropout_p is rounded to a multiple of 2^-24


@triton.jit
def keep_four(seed, threshold, b_0, b_1, b_2, b_3):
    """Bytes [..., 2, 2], nonzero where dropout keeps the four columns of the counters b_0 .. b_3 [...], in order."""
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_0, b_1, b_2, b_3)
    # A byte each, because that is what changing the layout then moves.
    b_0 = ((b_0 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_1 = ((b_1 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_2 = ((b_2 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_3 = ((b_3 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    return tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))


@triton.jit
def keep_block(p_seed, threshold, o_row, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """[BT, BD], true where dropout keeps the value."""
    # [BT, BD / 4]
    b_row = o_row[:, None] + tl.zeros([BT, BD // 4], dtype=tl.int32)
    b_quad = tl.arange(0, BD // 4)[None, :] + tl.zeros([BT, BD // 4], dtype=tl.int32)
    b_zero = tl.zeros([BT, BD // 4], dtype=tl.int32)
    return tl.reshape(keep_four(tl.load(p_seed), threshold, b_quad, b_row, b_zero, b_zero), [BT, BD]) != 0


def check_dropout(dropout_p: float, seed: int | Tensor | None, device: torch.device) -> None:
    """Raises ValueError for a probability or a seed that no operator takes which runs on `device`."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.dim() or seed.device != device):
        raise ValueError(
            f"seed: expected torch.int64 [] on {device}, got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an int64, got {seed}")


def seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of a call's dropout, [] of int64 on `device`; None where nothing is dropped.

    A missing one comes from the device's generator: nobody waits for it, and a CUDA graph draws it at each replay.
    """
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), device=device)
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def threshold_of(dropout_p: float) -> int:
    """What the random bits of a value must reach for it to be kept."""
    return round(dropout_p * 2**RANDOM_BITS)


def keeps(seed: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor], dropout_p: float) -> Tensor:
    """`keep_four` in PyTorch: bool [..., 4] from a counter of four int64 tensors that broadcast to [...]."""
    bits = torch.stack(torch.broadcast_tensors(*philox(seed, counter)), -1) >> 32 - RANDOM_BITS
    return bits >= threshold_of(dropout_p)


def philox(seed: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of Philox4x32-10, in int64 because torch has no full arithmetic in uint32."""
    low = 0xFFFFFFFF
    key_0, key_1 = seed & low, seed >> 32 & low
    word_0, word_1, word_2, word_3 = counter
    for _ in range(10):
        # Products of two 32-bit numbers wrap to negative int64s, whose upper and lower words are still right.
        product_0, product_1 = word_0 * 0xD2511F53, word_2 * 0xCD9E8D57
        word_0, word_1 = (product_1 >> 32 & low) ^ word_1 ^ key_0, product_1 & low
        word_2, word_3 = (product_0 >> 32 & low) ^ word_3 ^ key_1, product_0 & low
        key_0, key_1 = key_0 + 0x9E3779B9 & low, key_1 + 0xBB67AE85 & low
    return word_0, word_1, word_2, word_3
