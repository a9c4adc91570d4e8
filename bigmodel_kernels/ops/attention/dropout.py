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

# Elements made at a time: on the CPU as many as stay in a core's cache through the ten rounds.
_CHUNK = {"cpu": 1 << 15}
_CHUNK_ELSEWHERE = 1 << 24


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers; the int64 product wraps, and has the right
    bits.
    """
    product = b * a
    low = product & _MASK
    return product.bitwise_right_shift_(32).bitwise_and_(_MASK), low


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
    device = like.device
    chunk = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    pairs, count, width = like.shape[0] * heads, like.shape[2], like.shape[3]
    seed = seed.to(torch.int64)
    seeds = (seed & _MASK, (seed >> 32) & _MASK)
    threshold, scale = round(p * 2**32), 1 / (1 - p)
    key = torch.arange(keys.start, keys.stop, device=device)
    query = torch.arange(rows.start, rows.stop, device=device)[:, None]
    pair = torch.arange(pairs, device=device)[:, None, None]
    result = torch.empty((pairs, count, width), dtype=like.dtype, device=device)
    row_step = min(count, max(1, chunk // max(1, width)))
    pair_step = max(1, chunk // max(1, row_step * width))
    for i in range(0, pairs, pair_step):
        some = pair[i : i + pair_step]
        head, batch = some % heads, some // heads + sequence
        for j in range(0, count, row_step):
            word = philox((key, query[j : j + row_step], head, batch), seeds)
            torch.mul(word >= threshold, scale, out=result[i : i + pair_step, j : j + row_step])
    return result.view(like.shape)
