"""Dropout whose mask is a function of a seed and positions, so that backward and tests can recompute it.

Philox4x32-10 (Salmon et al., SC 2011) maps a counter of four words to four random words, one for each of four
neighbouring columns. A value is kept if the high 24 bits of its word are at least 2^24 * dropout_p.

Kernels read the seed from memory, so each replay of a CUDA graph uses the seed last written or drawn there.
"""

import torch
from torch import Tensor

from lion_kernels.core.arguments import as_int64, as_number, check_tensors
from lion_kernels.core.backend import tl, triton

RANDOM_BITS = 24  # used of each word; dropout_p is rounded to a multiple of 2^-24


@triton.jit
def keep_four(seed, threshold, b_0, b_1, b_2, b_3):
    """Return bytes [..., 2, 2], nonzero where dropout keeps the columns of the counters b_0 .. b_3 [...], in order."""
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_0, b_1, b_2, b_3)
    # Bytes, to move the least when the layout changes.
    b_0 = ((b_0 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_1 = ((b_1 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_2 = ((b_2 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    b_3 = ((b_3 >> 8).to(tl.int32) >= threshold).to(tl.int8)
    return tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))


@triton.jit
def keep_block(p_seed, threshold, o_row, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Return [BT, BD], true where dropout keeps the value."""
    # [BT, BD / 4]
    b_row = o_row[:, None] + tl.zeros([BT, BD // 4], dtype=tl.int32)
    b_quad = tl.arange(0, BD // 4)[None, :] + tl.zeros([BT, BD // 4], dtype=tl.int32)
    b_zero = tl.zeros([BT, BD // 4], dtype=tl.int32)
    return tl.reshape(keep_four(tl.load(p_seed), threshold, b_quad, b_row, b_zero, b_zero), [BT, BD]) != 0


def check_dropout(dropout_p: float, seed: int | Tensor | None, name: str, x: Tensor) -> float:
    """Check the probability and the seed for `x`, an operator's argument `name`; return the probability as a float.

    Raises:
        TypeError: another type.
        ValueError: a probability outside [0, 1), or a seed that is no int64 [] on x's device.
    """
    if type(dropout_p) is not float:
        dropout_p = as_number("dropout_p", dropout_p, "0 <= dropout_p < 1")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    if isinstance(seed, Tensor):
        check_tensors({name: x, "seed": seed})
        if seed.dtype != torch.int64 or seed.dim() or seed.device != x.device:
            raise ValueError(
                f"seed: expected torch.int64 [] on {x.device}, got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
    elif seed is not None:
        as_int64("seed", seed)
    return dropout_p


def seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """Return the seed of a call's dropout as an int64 tensor [] on `device`; None without dropout.

    A missing seed is drawn from the device's generator, without synchronising; a CUDA graph draws it at each replay.
    """
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), device=device)
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def threshold_of(dropout_p: float) -> int:
    """Return the threshold that a value's random bits must reach for the value to be kept."""
    return round(dropout_p * 2**RANDOM_BITS)


def keeps(seed: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor], dropout_p: float) -> Tensor:
    """Compute `keep_four` in PyTorch: bool [..., 4] from a counter of four int64 tensors that broadcast to [...]."""
    bits = torch.stack(torch.broadcast_tensors(*philox(seed, counter)), -1) >> 32 - RANDOM_BITS
    return bits >= threshold_of(dropout_p)


def philox(seed: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10, in int64 because torch lacks full uint32 arithmetic."""
    low = 0xFFFFFFFF
    key_0, key_1 = seed & low, seed >> 32 & low
    word_0, word_1, word_2, word_3 = counter
    for _ in range(10):
        # Products of two 32-bit numbers may wrap to negative int64s, whose upper and lower words are still right.
        product_0, product_1 = word_0 * 0xD2511F53, word_2 * 0xCD9E8D57
        word_0, word_1 = (product_1 >> 32 & low) ^ word_1 ^ key_0, product_1 & low
        word_2, word_3 = (product_0 >> 32 & low) ^ word_3 ^ key_1, product_0 & low
        key_0, key_1 = key_0 + 0x9E3779B9 & low, key_1 + 0xBB67AE85 & low
    return word_0, word_1, word_2, word_3
