"""Dropout whose mask is a function of a seed and of places, so that backward, and a test, can have it again.

Philox4x32-10 (Salmon et al., SC 2011) answers a counter of four words with four random ones: one each for four
neighbouring columns. A value is kept where the high 24 bits of its word reach 2^24 * dropout_p.
"""

import torch
from torch import Tensor

from lion_kernels.backend import tl, triton

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
