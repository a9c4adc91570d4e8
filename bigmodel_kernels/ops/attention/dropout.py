"""Dropout of attention probabilities that every backend and the backward can repeat: a counter-based
generator.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
    key     = the two 32-bit halves of the seed
    counter = (key index, query index, head, batch index or number of the packed sequence)
and the first of the four words of the result: an element is kept when that word is at least round(p * 2**32),
and then scaled by 1 / (1 - p). An element's fate depends on its place alone, not on blocks or on the order of
work.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, in signed 64-bit arithmetic."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)  # below 2**48 + 2**32
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """First word of Philox-4x32-10, as int64 in [0, 2**32). Counters broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def keep_mask(
    seed: Tensor, p: float, sequence: int, heads: int, rows: slice, keys: slice, like: Tensor
) -> Tensor:
    """1 / (1 - p) where a probability of the block `like` (B, H, R, K) is kept and 0 where it is dropped."""
    batch = like.shape[0]
    device = like.device

    def axis(start: int, stop: int, dim: int) -> Tensor:
        index = torch.arange(start, stop, device=device)
        return index.view([-1 if d == dim else 1 for d in range(4)])

    seed = seed.to(torch.int64)
    word = philox(
        (
            axis(keys.start, keys.stop, 3),
            axis(rows.start, rows.stop, 2),
            axis(0, heads, 1),
            axis(sequence, sequence + batch, 0),
        ),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    return (word >= round(p * 2**32)).to(like.dtype) / (1 - p)
