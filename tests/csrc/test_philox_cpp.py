"""The compiled generator and its two dropout rules, bit for bit, on every instruction set.

The expected words are made here in plain Python integers, apart from the package's own generator, and that
copy is held to the published known answers first.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_kernels import _native

if not _native.available():
    pytest.skip(f"needs the compiled library: {_native.reason()}", allow_module_level=True)

native = torch.ops.bigmodel
ISAS = native.cpu_isas().split(", ")
MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def without_bit_3(i: int) -> int:
    return (i >> 4) << 3 | i & 7


def expected_word(rule: str, seed: int, row: int, column: int, head: int, sequence: int) -> int:
    key = (seed & MASK, seed >> 32 & MASK)
    if rule == "attention":
        counter = (without_bit_3(column), without_bit_3(row), head, sequence)
        return philox(counter, key)[(column >> 3 & 1) + 2 * (row >> 3 & 1)]
    return philox(((column >> 5) << 3 | column & 7, row & MASK, row >> 32, 0), key)[column >> 3 & 3]


def test_known_answers() -> None:
    """Random123's own vectors for philox4x32, 10 rounds."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox((MASK, MASK, MASK, MASK), (MASK, MASK)) == ones
    pi = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == pi


@pytest.mark.parametrize("rule", ["attention", "elements"])
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**62 - 1),
    rows=st.integers(1, 20),
    columns=st.sampled_from([1, 7, 8, 17, 40, 65, 100]),
    first_row=st.sampled_from([0, 1, 8, 13, 2**31 - 3, 2**32 - 5]),
    head=st.integers(0, 40),
    sequence=st.integers(0, 2**31),
    p=st.floats(1e-6, 0.999999),
)
def test_words(
    rule: str, seed: int, rows: int, columns: int, first_row: int, head: int, sequence: int, p: float
) -> None:
    words = torch.tensor(
        [
            [expected_word(rule, seed, first_row + i, j, head, sequence) for j in range(columns)]
            for i in range(rows)
        ]
    )
    kept = words >= round(p * 2**32)
    before = native.cpu_isa()
    try:
        for isa in ISAS:
            native.cpu_set_isa(isa)
            result = native.cpu_philox(torch.tensor(seed), rows, columns, rule, first_row, head, sequence, p)
            assert torch.equal(result[0].to(torch.int64) & MASK, words), isa
            assert torch.equal(result[1], kept), isa
            if rule == "elements":  # what an epilogue makes of a row of ones
                scale = torch.tensor(1 / (1 - p), dtype=torch.float32)
                assert torch.equal(result[2], kept * scale), isa
    finally:
        native.cpu_set_isa(before)


def test_share_kept(isa: str) -> None:
    _, kept, _ = native.cpu_philox(torch.tensor(7), 512, 512, "attention", 0, 3, 1, 0.1)
    assert kept.double().mean().item() == pytest.approx(0.9, abs=5 * (0.09 / 512**2) ** 0.5)
    # Neighbours, and the four words of a call, know nothing of each other.
    centred = kept.double() - 0.9
    for i, j in ((0, 1), (1, 0), (8, 0), (0, 8), (8, 8)):
        product = centred[i:, j:] * centred[: 512 - i, : 512 - j]
        assert abs(product.mean().item()) < 5 * 0.09 / 512


def test_bad_arguments_are_named() -> None:
    seed = torch.tensor(1)
    with pytest.raises(RuntimeError, match="rule: 'rows' is not one of"):
        native.cpu_philox(seed, 1, 1, "rows", 0, 0, 0, 0.5)
    with pytest.raises(RuntimeError, match=r"dropout_p: 1\.5"):
        native.cpu_philox(seed, 1, 1, "elements", 0, 0, 0, 1.5)
    with pytest.raises(RuntimeError, match="seed"):
        native.cpu_philox(torch.zeros(2), 1, 1, "elements", 0, 0, 0, 0.5)
