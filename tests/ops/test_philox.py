"""The generator behind dropout: published answers, the two rules element by element, and its statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigmodel_kernels.ops import philox
from bigmodel_kernels.ops.philox import keep_attention, keep_elements, philox4x32

MASK = 0xFFFFFFFF


def philox_of_integers(counter: list[int], seed: int) -> list[int]:
    """The generator in Python's own integers, which never wrap."""
    c, key = list(counter), [seed & MASK, (seed >> 32) & MASK]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ key[0], second & MASK, (first >> 32) ^ c[3] ^ key[1], first & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return c


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """The vectors that Random123 publishes for philox4x32 with ten rounds."""
    c, k = [torch.tensor(v) for v in counter], [torch.tensor(v) for v in key]
    words = philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    assert tuple(w.item() for w in words) == expected
    assert tuple(philox_of_integers(list(counter), key[0] | key[1] << 32)) == expected


def kept_attention(seed: int, p: float, sequence: int, head: int, q: int, k: int) -> bool:
    counter = [(k // 16) * 8 + k % 8, (q // 16) * 8 + q % 8, head, sequence]
    return philox_of_integers(counter, seed)[k // 8 % 2 + 2 * (q // 8 % 2)] >= round(p * 2**32)


def kept_element(seed: int, p: float, row: int, column: int) -> bool:
    counter = [(column // 32) * 8 + column % 8, row & MASK, row >> 32, 0]
    return philox_of_integers(counter, seed)[column // 8 % 4] >= round(p * 2**32)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.sampled_from([0.1, 0.5, 0.9]),
    sequence=st.integers(0, 2**20),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    row=st.integers(0, 70) | st.integers(2**31 - 50, 2**31),
    key=st.integers(0, 70),
    count=st.integers(1, 5),
    width=st.integers(1, 20),
)
def test_attention_by_the_rule(
    seed: int, p: float, sequence: int, batch: int, heads: int, row: int, key: int, count: int, width: int
) -> None:
    like = torch.empty(batch, heads, count, width, dtype=torch.float64)
    keep = keep_attention(
        torch.tensor(seed), p, sequence, heads, slice(row, row + count), slice(key, key + width), like
    )
    assert keep.shape == like.shape and keep.dtype == like.dtype
    expected = [
        [
            [
                [kept_attention(seed, p, sequence + b, h, row + i, key + j) / (1 - p) for j in range(width)]
                for i in range(count)
            ]
            for h in range(heads)
        ]
        for b in range(batch)
    ]
    assert torch.equal(keep, torch.tensor(expected, dtype=torch.float64))


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.sampled_from([0.1, 0.5, 0.9]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    start=st.integers(0, 100) | st.integers(2**32 - 3, 2**33),
)
def test_elements_by_the_rule(seed: int, p: float, rows: int, columns: int, start: int) -> None:
    keep = keep_elements(torch.tensor(seed), p, rows, columns, torch.float64, "cpu", row_start=start)
    expected = [[kept_element(seed, p, start + i, j) / (1 - p) for j in range(columns)] for i in range(rows)]
    assert torch.equal(keep, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_blocks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, rows, keys = torch.tensor(1234567890123), slice(0, 37), slice(0, 61)
    whole = keep_attention(seed, 0.4, 0, 3, rows, keys, torch.empty(4, 3, 37, 61))
    matrix = keep_elements(seed, 0.4, 53, 77, torch.float32, "cpu")
    monkeypatch.setattr(philox, "_CHUNK", {"cpu": chunk})
    assert torch.equal(whole, keep_attention(seed, 0.4, 0, 3, rows, keys, torch.empty(4, 3, 37, 61)))
    assert torch.equal(matrix, keep_elements(seed, 0.4, 53, 77, torch.float32, "cpu"))
    part = keep_attention(seed, 0.4, 2, 3, slice(5, 30), slice(19, 50), torch.empty(1, 3, 25, 31))
    assert torch.equal(part[0], whole[2, :, 5:30, 19:50])
    some = keep_elements(seed, 0.4, 11, 77, torch.float32, "cpu", row_start=40)
    assert torch.equal(some, matrix[40:51])


def _uniform(kept: Tensor, p: float) -> None:
    """The share that is kept, over all and along each dimension, is within five standard deviations."""
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / kept.numel() ** 0.5
    for dim in range(kept.dim()):
        others = [d for d in range(kept.dim()) if d != dim]
        count = kept.numel() / kept.shape[dim]
        assert (kept.mean(others) - (1 - p)).abs().max() < 5 * deviation / count**0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(p: float) -> None:
    attention = keep_attention(
        torch.tensor(7), p, 0, 4, slice(0, 128), slice(0, 128), torch.empty(4, 4, 128, 128).double()
    )
    matrix = keep_elements(torch.tensor(8), p, 512, 384, torch.float64, "cpu")
    for keep in (attention, matrix):
        assert set(keep.unique().tolist()) == {0.0, 1 / (1 - p)}
        kept = (keep > 0).double()
        _uniform(kept, p)
        centred = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
        # Neighbours at the distances at which elements share a call of the generator do not go together.
        for dim in (-1, -2):
            for distance in (1, 8, 16, 24):
                size = kept.shape[dim] - distance
                product = centred.narrow(dim, 0, size) * centred.narrow(dim, distance, size)
                assert abs(product.mean()) < 5 / product.numel() ** 0.5


def test_another_seed_is_another_mask() -> None:
    masks = [keep_elements(torch.tensor(s), 0.5, 64, 64, torch.float32, "cpu") for s in (1, 2, 1 << 40)]
    for i in range(3):
        for j in range(i):
            assert 0.4 < (masks[i] == masks[j]).float().mean() < 0.6


def test_empty() -> None:
    seed = torch.tensor(1)
    assert keep_elements(seed, 0.5, 0, 5, torch.float32, "cpu").shape == (0, 5)
    assert keep_elements(seed, 0.5, 5, 0, torch.float32, "cpu").shape == (5, 0)
    like = torch.empty(0, 2, 3, 4)
    assert keep_attention(seed, 0.5, 0, 2, slice(0, 3), slice(0, 4), like).shape == like.shape


def test_nearly_all_dropped() -> None:
    """The largest threshold fits in 32 bits."""
    assert philox.threshold(0.5) == 2**31
    assert philox.threshold(1 - 2**-53) == 2**32 - 1
