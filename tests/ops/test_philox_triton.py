"""Tiles of dropout in Triton are those of the definition, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import triton
import triton.language as tl

from bigmodel_kernels.ops import philox
from bigmodel_kernels.ops.philox_triton import keep_attention, keep_elements
from bigmodel_kernels.triton_runtime import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
SEEDS = st.integers(0, 2**62 - 1)


@triton.jit
def _attention_tile(
    out_ptr, seed_ptr, least, first_query, first_key, head, sequence,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, KEYS if TRANSPOSED else QUERIES)[:, None]
    columns = tl.arange(0, QUERIES if TRANSPOSED else KEYS)[None, :]
    kept = keep_attention(
        tl.load(seed_ptr), least, first_query, first_key, head, sequence, QUERIES, KEYS, TRANSPOSED
    )
    tl.store(out_ptr + rows * (QUERIES if TRANSPOSED else KEYS) + columns, kept.to(tl.int32))


@triton.jit
def _elements_tile(
    out_ptr, seed_ptr, least, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    kept = keep_elements(tl.load(seed_ptr), least, rows + tl.cast(first_row, tl.int64), first_column, COLUMNS)
    tl.store(out_ptr + rows[:, None] * COLUMNS + columns[None, :], kept.to(tl.int32))


def _seed(seed: int) -> Tensor:
    return torch.tensor(seed, device=DEVICE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=SEEDS,
    p=st.sampled_from([0.1, 0.5, 0.9, 1 - 2.0**-34]),
    shape=st.sampled_from([(16, 16), (32, 64), (64, 32), (16, 128)]),
    first_query=st.sampled_from([0, 16, 4080, 2**31 - 128]),
    first_key=st.sampled_from([0, 48, 65536]),
    head=st.integers(0, 200),
    sequence=st.integers(0, 100_000),
    transposed=st.booleans(),
)
def test_attention(
    seed: int, p: float, shape: tuple[int, int], first_query: int, first_key: int, head: int, sequence: int,
    transposed: bool,
) -> None:  # fmt: skip
    queries, keys = shape
    out = torch.full(shape[::-1] if transposed else shape, -1, dtype=torch.int32, device=DEVICE)
    _attention_tile[1,](
        out, _seed(seed), philox.threshold(p), first_query, first_key, head, sequence,
        QUERIES=queries, KEYS=keys, TRANSPOSED=transposed,
    )  # fmt: skip
    expected = philox.keep_attention(
        _seed(seed), p, sequence, head + 1, slice(first_query, first_query + queries),
        slice(first_key, first_key + keys), torch.empty(1, head + 1, queries, keys, device=DEVICE),
    )[0, head]  # fmt: skip
    assert torch.equal((out.t() if transposed else out).bool(), expected != 0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=SEEDS,
    p=st.sampled_from([0.1, 0.5, 0.9]),
    shape=st.sampled_from([(1, 32), (4, 256), (16, 64), (1, 1024)]),
    first_row=st.sampled_from([0, 3, 2**31 - 2, 2**32 - 2, 2**40 + 7]),
    first_column=st.sampled_from([0, 32, 4096]),
)
def test_elements(seed: int, p: float, shape: tuple[int, int], first_row: int, first_column: int) -> None:
    rows, columns = shape
    out = torch.full(shape, -1, dtype=torch.int32, device=DEVICE)
    _elements_tile[1,](
        out, _seed(seed), philox.threshold(p), first_row, first_column, ROWS=rows, COLUMNS=columns
    )
    expected = philox.keep_elements(
        _seed(seed), p, rows, first_column + columns, torch.float32, DEVICE, row_start=first_row
    )
    assert torch.equal(out.bool(), expected[:, first_column:] != 0)
