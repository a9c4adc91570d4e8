"""Tiles of dropout in Triton: bit for bit what :mod:`bigmodel_kernels.ops.philox` says.

Both rules name one Philox counter for four elements, so a tile calls the generator on a quarter of its
elements and puts the four words where they belong::

    attention, 16 x 16 probabilities of one head         elements, 32 columns of one row

             keys 0-7   keys 8-15                          columns  0-7     8-15    16-23    24-31
    queries +----------+----------+                             +--------+--------+--------+--------+
      0-7   |  word 0  |  word 1  |                             | word 0 | word 1 | word 2 | word 3 |
            +----------+----------+                             +--------+--------+--------+--------+
      8-15  |  word 2  |  word 3  |
            +----------+----------+

Position (a, b) of an 8 x 8 square comes from one counter in all four squares: the four elements lie 8 rows or
8 columns apart, which a tensor core's accumulator keeps in one thread, whichever way the tile is turned.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words_kept(seed, least, c0, c1, c2, c3):
    """For each of the four words of Philox-4x32-10: is it at least ``least``?"""
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    least = tl.cast(least, tl.uint32)  # philox.threshold(p) always fits in 32 bits
    return w0 >= least, w1 >= least, w2 >= least, w3 >= least


@triton.jit
def keep_attention(
    seed, least, first_query, first_key, head, sequence,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which probabilities of a tile are kept: int1 (QUERIES, KEYS), or (KEYS, QUERIES) if TRANSPOSED.

    ``seed`` is the int64 scalar, ``least`` is ``philox.threshold(p)``. ``first_query`` and ``first_key``
    count inside the sequence and, like QUERIES and KEYS, are multiples of 16.
    """
    tl.static_assert(QUERIES % 16 == 0 and KEYS % 16 == 0, "a tile of dropout is whole squares of 16 x 16")
    ROWS: tl.constexpr = KEYS if TRANSPOSED else QUERIES
    COLUMNS: tl.constexpr = QUERIES if TRANSPOSED else KEYS
    # (ROWS / 2, COLUMNS / 2) counters: indices without their bit 3 are a range without gaps.
    row = (tl.arange(0, ROWS // 2) + (first_key if TRANSPOSED else first_query) // 2)[:, None]
    column = (tl.arange(0, COLUMNS // 2) + (first_query if TRANSPOSED else first_key) // 2)[None, :]
    zero = tl.zeros((ROWS // 2, COLUMNS // 2), dtype=tl.uint32)
    key, query = (row, column) if TRANSPOSED else (column, row)
    keep0, keep1, keep2, keep3 = _words_kept(
        seed, least, zero + key.to(tl.uint32), zero + query.to(tl.uint32), zero + head, zero + sequence
    )
    # Words by (bit of row, bit of column). Bit 0 of the word's number is the key's.
    upper_right, lower_left = (keep2, keep1) if TRANSPOSED else (keep1, keep2)
    by_column = tl.join(tl.join(keep0, lower_left), tl.join(upper_right, keep3))  # .., row bit, column bit
    squares = tl.reshape(by_column, (ROWS // 16, 8, COLUMNS // 16, 8, 2, 2))
    return tl.reshape(tl.permute(squares, (0, 4, 1, 2, 5, 3)), (ROWS, COLUMNS))


@triton.jit
def keep_elements(seed, least, rows, first_column, COLUMNS: tl.constexpr):
    """Which elements of a tile of a matrix are kept: int1 (len(rows), COLUMNS).

    ``rows`` is a 1D block of row numbers, int64 where the matrix may have more than 2^31 rows;
    ``first_column`` and COLUMNS are multiples of 32. ``seed`` and ``least`` as in :func:`keep_attention`.
    """
    tl.static_assert(COLUMNS % 32 == 0, "a tile of dropout is whole groups of 32 columns")
    ROWS: tl.constexpr = rows.shape[0]
    # (ROWS, COLUMNS / 4) counters: columns without their bits 3 and 4 are a range without gaps.
    column = (tl.arange(0, COLUMNS // 4) + first_column // 4)[None, :]
    row = rows.to(tl.int64)[:, None]
    zero = tl.zeros((ROWS, COLUMNS // 4), dtype=tl.uint32)
    keep0, keep1, keep2, keep3 = _words_kept(
        seed, least, zero + column.to(tl.uint32), zero + row.to(tl.uint32),
        zero + (row >> 32).to(tl.uint32), zero,
    )  # fmt: skip
    words = tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3))  # (.., .., bit 4, bit 3)
    groups = tl.reshape(words, (ROWS, COLUMNS // 32, 8, 2, 2))
    return tl.reshape(tl.permute(groups, (0, 1, 3, 4, 2)), (ROWS, COLUMNS))
