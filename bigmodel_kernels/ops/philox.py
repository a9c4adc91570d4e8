"""Dropout that every backend and every backward pass repeats from a seed: a counter-based generator.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
counter of four 32-bit words, under a key of two (the halves of the seed), into four random words. What is
dropped depends on the seed and on the place of the element alone, never on blocks, threads or the order of
work. An element is kept when its word is at least `threshold(p)`, and then scaled by 1 / (1 - p).

Attention probability of query q and key k of one head of one sequence (q and k count inside the sequence):

    counter = (drop3(k), drop3(q), head, number of the sequence)      drop3(i): i without its bit 3
    word    = bit 3 of k  +  2 * bit 3 of q

Element of a matrix of rows x columns (hidden states; the row counts over all leading dimensions):

    counter = (c without its bits 3 and 4, row's low 32 bits, row's high 32 bits, 0)
    word    = bits 3 and 4 of c

So one call of the generator serves four elements, which eight neighbouring lanes of a CPU vector, or one
thread's part of a tensor core's accumulator, hold together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF

# Counters worked on at a time: on the CPU as many as stay in a core's cache through the ten rounds.
_CHUNK = {"cpu": 1 << 13}
_CHUNK_ELSEWHERE = 1 << 22

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def threshold(p: float) -> int:
    """The least word that is kept: p of 2**32, and never so large that 32 bits do not hold it."""
    return min(round(p * 2**32), _MASK)


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four words of Philox-4x32-10, as int64 in [0, 2**32).

    Counter and key are int64 tensors with values in [0, 2**32), which broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers: the int64 product wraps, and has the right
    bits.
    """
    product = b * a
    low = product & _MASK
    return product.bitwise_right_shift_(32).bitwise_and_(_MASK), low


def _key(seed: Tensor) -> tuple[Tensor, Tensor]:
    seed = seed.reshape(()).to(torch.int64)
    return seed & _MASK, (seed >> 32) & _MASK


def keep_attention(
    seed: Tensor, p: float, sequence: int, heads: int, rows: slice, keys: slice, like: Tensor
) -> Tensor:
    """1 / (1 - p) where a probability is kept and 0 where it is dropped, for a block of probabilities.

    `like` is (B, H, R, K), and lends its shape, dtype and device: the probabilities of queries `rows` and
    keys `keys` of sequences `sequence`, `sequence` + 1, ... B of them.
    """
    device = like.device
    pairs, count, width = like.shape[0] * heads, like.shape[2], like.shape[3]
    result = like.new_empty((pairs, count, width))
    if result.numel() == 0:
        return result.view(like.shape)
    key_of_seed, least, scale = _key(seed), threshold(p), 1 / (1 - p)
    # Whole groups of 16 x 16 probabilities around the block: drop3 of their indices is a range without gaps.
    row_groups = range(rows.start // 16, -(-rows.stop // 16))
    key_groups = range(keys.start // 16, -(-keys.stop // 16))
    key = torch.arange(8 * key_groups.start, 8 * key_groups.stop, device=device)
    query = torch.arange(8 * row_groups.start, 8 * row_groups.stop, device=device)[:, None]
    pair = torch.arange(pairs, device=device)[:, None, None]
    left = keys.start - 16 * key_groups.start
    for some, groups in _steps(device, pairs, len(row_groups), 64 * len(key_groups)):
        block = pair[some]
        part = query[8 * groups.start : 8 * groups.stop]
        words = philox4x32((key, part, block % heads, block // heads + sequence), key_of_seed)
        # word 2 * (bit of q) + (bit of k): (pair, 8 * row groups, 8 * key groups) each
        kept = torch.stack([w >= least for w in words]).view(2, 2, len(block), -1, 8, len(key_groups), 8)
        kept = kept.permute(2, 3, 0, 4, 5, 1, 6).reshape(len(block), -1, 16 * len(key_groups))
        first = 16 * (row_groups.start + groups.start)
        begin, end = max(first, rows.start), min(first + kept.shape[1], rows.stop)
        part_of_result = result[some, begin - rows.start : end - rows.start]
        part_of_result.copy_(kept[:, begin - first : end - first, left : left + width]).mul_(scale)
    return result.view(like.shape)


def _steps(device: torch.device, outer: int, inner: int, size: int) -> Iterator[tuple[slice, slice]]:
    """outer x inner things of `size` counters each, in parts of about a chunk."""
    chunk = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    inner_step = min(inner, max(1, chunk // size))
    outer_step = max(1, chunk // (size * inner_step))
    for i in range(0, outer, outer_step):
        for j in range(0, inner, inner_step):
            yield slice(i, i + outer_step), slice(j, min(inner, j + inner_step))


def keep_elements(
    seed: Tensor,
    p: float,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device | str,
    row_start: int = 0,
) -> Tensor:
    """(rows, columns) of 1 / (1 - p) where an element is kept and 0 where it is dropped.

    `row_start` is the number of the first row, for work in parts.
    """
    device = torch.device(device)
    result = torch.empty((rows, columns), dtype=dtype, device=device)
    if result.numel() == 0:
        return result
    key_of_seed, least, scale = _key(seed), threshold(p), 1 / (1 - p)
    groups = -(-columns // 32)
    column = torch.arange(8 * groups, device=device)
    row = torch.arange(row_start, row_start + rows, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    for some, _ in _steps(device, rows, 1, 8 * groups):
        part = row[some]
        words = philox4x32((column, part & _MASK, part >> 32, zero), key_of_seed)
        kept = torch.stack([w >= least for w in words], 1).view(len(part), 4, groups, 8).transpose(1, 2)
        result[some].copy_(kept.reshape(len(part), -1)[:, :columns]).mul_(scale)
    return result
