"""Where each word moves each element, against the PTX ISA's tables, written out here, and Triton's layouts.

Tables of the PTX ISA, warp level matrix instructions: "Matrix Fragments for mma.m16n8k16 with floating point
type", and the figures of ldmatrix and stmatrix.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

LANES = range(32)


def run(run_word: Any, name: str, words: np.ndarray, count: int) -> np.ndarray:
    """The word on 32-bit words in and out."""
    output = torch.full((count,), -1, dtype=torch.int32)
    run_word(name, torch.from_numpy(words.view(np.int32).copy()), output)
    return output.numpy().view(np.uint32)


def halves(words: np.ndarray) -> np.ndarray:
    return words.view(np.uint16)


# (row, column) of half i of the fragment of lane 4 g + t, as the tables have them
def mma_a(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 or 4 <= i < 6 else g + 8), t * 2 + (i & 1) + (0 if i < 4 else 8)


def mma_b(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 2 + (i & 1) + (0 if i < 2 else 8), g


def mma_c(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_multiplies_by_the_tables(run_word: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, generator=generator).to(dtype) for size in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator)
    raw_a, raw_b = a.view(torch.int16).numpy(), b.view(torch.int16).numpy()
    words = np.zeros((32, 10), np.uint32)
    for lane in LANES:
        g, t = divmod(lane, 4)
        row = words[lane]
        row[:4].view(np.int16)[:] = [raw_a[mma_a(g, t, i)] for i in range(8)]
        row[4:6].view(np.int16)[:] = [raw_b[mma_b(g, t, i)] for i in range(4)]
        row[6:].view(np.float32)[:] = [c[mma_c(g, t, i)] for i in range(4)]
    out = run(run_word, f"mma_{str(dtype)[6:]}", words, 128).view(np.float32).reshape(32, 4)
    expected = (a.double() @ b.double() + c.double()).float().numpy()
    for lane in LANES:
        for i in range(4):
            assert out[lane, i] == expected[mma_c(*divmod(lane, 4), i)]


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_by_the_table(run_word: Any, transposed: bool) -> None:
    """The figure of ldmatrix: lane 4 r + c holds elements 2 c and 2 c + 1 of row r."""
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    name = "ldmatrix_transposed" if transposed else "ldmatrix"
    out = halves(run(run_word, name, matrices.reshape(-1).view(np.uint32), 128)).reshape(32, 4, 2)
    for lane in LANES:
        r, c = divmod(lane, 4)
        for i in range(4):
            matrix = matrices[i].T if transposed else matrices[i]
            assert list(out[lane, i]) == [matrix[r, 2 * c], matrix[r, 2 * c + 1]]


@pytest.mark.parametrize("suffix", ["", "_transposed"])
def test_stmatrix_is_ldmatrix_undone(run_word: Any, suffix: str) -> None:
    matrices = np.arange(256, dtype=np.uint16).view(np.uint32)
    dealt = run(run_word, f"ldmatrix{suffix}", matrices, 128)
    assert (run(run_word, f"stmatrix{suffix}", dealt, 128) == matrices).all()


def test_shuffles(run_word: Any) -> None:
    values = np.arange(100, 132, dtype=np.uint32)
    out = run(run_word, "shuffle", values, 64)
    assert list(out[:32]) == [100 + (lane ^ 5) for lane in LANES]
    assert list(out[32:]) == [131 - lane for lane in LANES]


def test_a_count_starts_again_after_its_last(run_word: Any) -> None:
    """PTX ISA, atom.inc: old >= last ? 0 : old + 1."""
    out = run(run_word, "count", np.array([7], np.uint32), 35)
    assert list(out[:8]) == [7, 0, 1, 2, 3, 4, 5, 0]
    assert out[32] == (32 - 1) % 6, "31 counts after the 0"
    assert out[33] == 0 and out[34] == sum(LANES), "each lane saw a number of its own"


def test_copies_fill_with_zeros(run_word: Any) -> None:
    values = np.arange(1, 129, dtype=np.uint32)
    out = run(run_word, "copy_async", values, 128).reshape(32, 4)
    expected = values.reshape(32, 4).copy()
    expected[1::2] = 0
    assert (out == expected).all()


def test_the_copy_engine_adds_floats(run_word: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    addends, output = torch.randn(2, 128, generator=generator), torch.randn(128, generator=generator)
    expected = output + addends[0] + addends[1]
    run_word("bulk_add", addends.view(torch.int32), output.view(torch.int32))
    assert torch.equal(output, expected)


def test_philox_gives_the_known_answers(run_word: Any) -> None:
    """Known answers of the Random123 library for philox4x32-10: counter, key, result."""
    known = [
        ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    words = np.zeros((32, 6), np.uint32)
    for lane, (given, _) in enumerate(known):
        words[lane] = [int(word, 16) for word in given.split()]
    out = run(run_word, "philox", words, 128).reshape(32, 4)
    for lane, (_, expected) in enumerate(known):
        assert [f"{word:08x}" for word in out[lane]] == expected.split()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packing_rounds_as_torch_does(run_word: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    special = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        65504.0,
        65519.0,
        65520.0,
        1e-7,
        5.9e-8,
        2.9e-8,
        -3e-8,
        6.1e-5,
        1e38,
        3.4e38,
    ]
    values = torch.cat([torch.tensor(special), torch.randn(64 - len(special), generator=generator) * 1e-3])
    out = run(run_word, f"pack_{str(dtype)[6:]}", values.numpy().view(np.uint32), 32)
    assert (halves(out) == values.to(dtype).view(torch.int16).numpy().view(np.uint16)).all()


@pytest.mark.parametrize("columns", [32, 64, 96])
def test_swizzled_rows_spread_over_the_banks(run_word: Any, columns: int) -> None:
    out = run(run_word, f"swizzle_{columns}", np.zeros(1, np.uint32), 64 * columns // 8).reshape(
        64, columns // 8
    )
    assert sorted(out.ravel()) == list(range(0, 64 * columns * 2, 16)), "a place for every chunk, once"
    for row in range(0, 64, 8):
        for chunk in range(columns // 8):
            assert len({offset % 128 // 16 for offset in out[row : row + 8, chunk]}) == 8, (
                "eight groups of four banks"
            )


def wgmma_c(warp: int, g: int, t: int, i: int) -> tuple[int, int]:
    """The accumulator's table, "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"."""
    return 16 * warp + (g if i % 4 < 2 else g + 8), t * 2 + (i & 1) + i // 4 * 8


@pytest.mark.parametrize(
    ("dtype", "columns", "transposed", "suffix"),
    [
        (torch.bfloat16, 64, False, ""),
        (torch.bfloat16, 64, True, ""),
        (torch.float16, 128, True, ""),
        (torch.bfloat16, 32, False, ""),
        (torch.float16, 192, True, ""),
        (torch.bfloat16, 256, True, ""),
        (torch.bfloat16, 96, False, "_registers"),
        (torch.bfloat16, 32, True, "_registers"),
        (torch.float16, 192, True, "_registers"),
        (torch.bfloat16, 256, True, "_registers"),
    ],
)
def test_wgmma_multiplies_swizzled_tiles(
    run_word: Any, dtype: torch.dtype, columns: int, transposed: bool, suffix: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(64, 64, generator=generator).to(dtype)
    b = torch.randn((64, columns) if transposed else (columns, 64), generator=generator).to(dtype)
    words = torch.cat([a.flatten(), b.flatten()]).view(torch.int16).numpy().view(np.uint32)
    name = f"wgmma_{str(dtype)[6:]}_{columns}{'_transposed' if transposed else ''}{suffix}"
    out = run(run_word, name, words, 64 * columns).view(np.float32).reshape(4, 8, 4, columns // 2)
    expected = (a.double() @ (b if transposed else b.t()).double()).numpy()
    for warp in range(4):
        for g in range(8):
            for t in range(4):
                for i in range(columns // 2):
                    assert abs(out[warp, g, t, i] - expected[wgmma_c(warp, g, t, i)]) < 1e-4


@pytest.mark.parametrize("columns", [64, 32])
@pytest.mark.parametrize("start", [(0, 0, 1, 1), (32, 40, 2, 0), (-16, -3, 0, 1)], ids=str)
def test_the_copy_engine_swizzles_and_fills(
    library: Path, run_word: Any, columns: int, start: tuple[int, int, int, int]
) -> None:
    source = torch.arange(1, 2 * 3 * 70 * 72 + 1, dtype=torch.int16).view(2, 3, 70, 72)
    output = torch.full((64 * columns // 2,), -1, dtype=torch.int32)
    torch.ops.bigmodel_testing.run_tma(f"tma_{columns}", source.view(torch.bfloat16), output, list(start))
    place = run(run_word, f"swizzle_{columns}", np.zeros(1, np.uint32), 64 * columns // 8)
    rows = output.numpy().view(np.int16).reshape(-1, 8)[place // 16].reshape(64, columns)
    for row in range(64):
        for column in range(columns):
            r, c = row + start[1], column + start[0]
            inside = 0 <= r < 70 and 0 <= c < 72
            assert rows[row, column] == (source[start[3], start[2], r, c] if inside else 0)


# ------------------------------------------------------------------------------------------------------------
# the second witness


@functools.cache
def triton_layouts() -> dict[str, dict[str, Any]]:
    """What Triton's compiler says of the same instructions' fragments and of the same swizzle."""
    pytest.importorskip("triton.experimental.gluon")
    script = Path(__file__).with_name("triton_layouts.py")
    environment = {**os.environ, "TRITON_ALWAYS_COMPILE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return result


def position(layout: dict[str, Any], **numbers: int) -> tuple[int, int]:
    """A linear layout: each bit of a register's, lane's, ... number moves by a basis vector."""
    at = [0, 0]
    for kind, number in numbers.items():
        bases = layout[f"{kind}_bases"]
        for bit, basis in enumerate(bases):
            if number >> bit & 1:
                at = [x ^ y for x, y in zip(at, basis, strict=True)]
    return at[0], at[1]


@pytest.mark.parametrize(("name", "table", "count"), [("a", mma_a, 8), ("b", mma_b, 4), ("c", mma_c, 4)])
def test_triton_agrees_about_the_fragments(name: str, table: Any, count: int) -> None:
    layout = triton_layouts()[f"mma_{name}"]
    for lane in LANES:
        for i in range(count):
            assert position(layout, reg=i, lane=lane) == table(*divmod(lane, 4), i)


@pytest.mark.parametrize("columns", [32, 64])
def test_triton_agrees_about_the_swizzle(run_word: Any, columns: int) -> None:
    out = run(run_word, f"swizzle_{columns}", np.zeros(1, np.uint32), 64 * columns // 8).reshape(
        64, columns // 8
    )
    layout = triton_layouts()[f"tile_{2 * columns}"]
    for row in range(64):
        for chunk in range(columns // 8):
            assert position(layout, offset=int(out[row, chunk]) // 2) == (row, 8 * chunk)


def test_triton_agrees_about_the_accumulator_of_a_warpgroup() -> None:
    layout = triton_layouts()["wgmma_c"]
    for warp in range(4):
        for lane in LANES:
            for i in range(16):
                assert position(layout, reg=i, lane=lane, warp=warp) == wgmma_c(warp, *divmod(lane, 4), i)


def test_triton_agrees_about_the_register_operand_of_a_warpgroup() -> None:
    """A from registers is mma's fragment for the warp's 16 rows."""
    layout = triton_layouts()["wgmma_a"]
    for warp in range(4):
        for lane in LANES:
            for i in range(8):
                row, column = mma_a(*divmod(lane, 4), i)
                assert position(layout, reg=i, lane=lane, warp=warp) == (16 * warp + row, column)
