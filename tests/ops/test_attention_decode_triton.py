"""Decoding in Triton, over contiguous and paged caches, against float64: in the interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

from attention_eager import eager_attention
from triton_dtypes import DTYPES, QUICK_DTYPES

import bigmodel_kernels as bk
from bigmodel_kernels.ops.attention import triton as kernel
from bigmodel_kernels.ops.attention import triton_decode
from bigmodel_kernels.triton_runtime import AMPERE, BLACKWELL, HOPPER, INTERPRETED, MI300
from bigmodel_kernels.verify import compare, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned():
        yield


@pytest.fixture(params=[1, 3])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One part of the keys, and several, in small tiles."""
    monkeypatch.setattr(triton_decode, "decode_splits", lambda *_: request.param)
    monkeypatch.setattr(triton_decode, "decode_tile", lambda *_: (16, 16, 1, 1))
    return request.param


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _lengths(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def _pages(cache: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The pages of a contiguous cache in random order, among others that are NaN, and the block table."""
    batch, heads, capacity, dim = cache.shape
    blocks = -(-capacity // size)
    padded = torch.full((batch, heads, blocks * size, dim), torch.nan, dtype=cache.dtype, device=DEVICE)
    padded[:, :, :capacity] = cache
    order = torch.randperm(batch * blocks + 3, device=DEVICE)[: batch * blocks]
    pages = torch.full((batch * blocks + 3, heads, size, dim), torch.nan, dtype=cache.dtype, device=DEVICE)
    pages[order] = padded.view(batch, heads, blocks, size, dim).transpose(1, 2).flatten(0, 1)
    return pages, order.view(batch, blocks).to(torch.int32)


def _check(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, table: Tensor | None = None,
    caches: tuple[Tensor, Tensor] | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`key` and `value` are contiguous; `caches` is how the kernel gets them."""
    options = {"softmax_scale": query.shape[-1] ** -0.5, "is_causal": True, **options}
    arguments = (query, *(caches or (key, value)), lengths, table)
    assert kernel.supports_decode(*arguments, **options) is None
    out, logsumexp = kernel.run_decode(*arguments, **options)
    assert out.shape == query.shape and out.dtype == query.dtype and out.transpose(1, 2).is_contiguous()
    assert logsumexp.shape == query.shape[:3] and logsumexp.dtype == torch.float32
    for b, length in enumerate(lengths.tolist()):
        extras = dict(options)
        slopes = extras.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            extras["alibi_slopes"] = slopes[b]
        parts = (query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length])
        exact, exact_lse = eager_attention(*(part.double() for part in parts), **extras)
        eager, _ = eager_attention(*parts, **extras)
        verdict = compare(out[b : b + 1], eager, exact)
        # A few hundred numbers: their mean scatters by more than the rule's margin between float32 results.
        mean_ok = verdict.mean_error <= 1.1 * verdict.mean_limit
        assert verdict.max_error <= verdict.max_limit and mean_ok, (b, verdict)
        torch.testing.assert_close(logsumexp[b : b + 1].double(), exact_lse, rtol=1e-5, atol=2e-5)
    return out, logsumexp


SHAPES = ((1, 4, 4, 32), (3, 8, 2, 17), (5, 6, 1, 128))
QUICK = ((*SHAPES[0], torch.float16), (*SHAPES[1], torch.float32), (*SHAPES[2], torch.bfloat16))


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "dtype"),
    [
        *QUICK,
        *(
            pytest.param(*shape, dtype, marks=pytest.mark.slow)
            for shape in SHAPES
            for dtype in DTYPES
            if (*shape, dtype) not in QUICK
        ),
    ],
    ids=str,
)
def test_shapes(rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, splits: int) -> None:
    """Lengths from none to all; fewer keys than queries; several tiles of rows."""
    query = _tensor(4, heads, rows, dim, dtype=dtype)
    key, value = (_tensor(4, kv_heads, 70, dim, dtype=dtype) for _ in range(2))
    key[2, :, 33:], value[2, :, 33:] = torch.nan, torch.nan  # past the end
    lengths = _lengths(70, 0, 33, 2)
    out, logsumexp = _check(query, key, value, lengths)
    assert (out[1] == 0).all() and (logsumexp[1] == -torch.inf).all()
    for size in (1, 16, 24):
        pages, table = _pages(key, size)
        value_pages = torch.full_like(pages, torch.nan)
        value_pages[table.flatten().long()] = _pages_in_order(value, size)
        paged = kernel.run_decode(
            query, pages, value_pages, lengths, table, softmax_scale=dim**-0.5, is_causal=True
        )
        assert torch.equal(paged[0], out) and torch.equal(paged[1], logsumexp)


def _pages_in_order(cache: Tensor, size: int) -> Tensor:
    batch, heads, capacity, dim = cache.shape
    blocks = -(-capacity // size)
    padded = torch.full((batch, heads, blocks * size, dim), torch.nan, dtype=cache.dtype, device=DEVICE)
    padded[:, :, :capacity] = cache
    return padded.view(batch, heads, blocks, size, dim).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_features(dtype: torch.dtype, splits: int) -> None:
    query = _tensor(2, 4, 3, 32, dtype=dtype)
    key, value = (_tensor(2, 2, 50, 32, dtype=dtype) for _ in range(2))
    lengths = _lengths(50, 21)
    slopes = torch.rand(2, 4, device=DEVICE)
    sinks = torch.tensor([-torch.inf, -2.0, 1.0, 3.0], device=DEVICE)
    _check(query, key, value, lengths, window_left=9)
    _check(query, key, value, lengths, window_left=9, window_right=2, is_causal=False, softcap=4.0)
    _check(query, key, value, lengths, alibi_slopes=slopes)
    _check(query, key, value, lengths, alibi_slopes=slopes[0], sinks=sinks.to(dtype), is_causal=False)
    out, logsumexp = _check(query, key, value, _lengths(50, 0), sinks=sinks)
    assert (out[1] == 0).all()
    torch.testing.assert_close(logsumexp[1], sinks[:, None].expand(4, 3))


def test_strides(splits: int) -> None:
    """Caches stored as (B, S, H, D) and (pages, page_size, H, D), and every second head of a larger one."""
    query = _tensor(2, 3, 8, 16).transpose(1, 2)[:, ::2]
    key, value = _tensor(2, 2, 40, 4, 16).transpose(2, 3)[:, :, ::2]
    lengths = torch.tensor([[40, 1], [13, 1]], dtype=torch.int32, device=DEVICE)[:, 0]
    _check(query, key, value, lengths)
    pages, table = _pages(key, 16)
    both = torch.stack([pages, pages]).transpose(2, 3).contiguous().transpose(2, 3)
    _check(query, key, key, lengths, table.t().contiguous().t(), caches=(both[0], both[1]))


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2, 4]),
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    size=st.sampled_from([None, 5, 16]),
    left=st.integers(-1, 40),
    is_causal=st.booleans(),
)
def test_any(
    rows: int, kv_heads: int, lengths: list[int], size: int | None, left: int, is_causal: bool, splits: int
) -> None:
    query = _tensor(len(lengths), 4, rows, 8)
    key = _tensor(len(lengths), kv_heads, 60, 8)
    pages, table = (key, None) if size is None else _pages(key, size)
    _check(
        query, key, key, _lengths(*lengths), table, caches=(pages, pages), window_left=left,
        is_causal=is_causal,
    )  # fmt: skip


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    query, key, value = _tensor(1, 4, 1, 32), _tensor(1, 2, 300, 32), _tensor(1, 2, 300, 32)
    out, logsumexp = bk.attention_decode(query, key, value, _lengths(290), return_logsumexp=True)
    expected = kernel.run_decode(query, key, value, _lengths(290), softmax_scale=32**-0.5)
    assert torch.equal(out, expected[0]) and torch.equal(logsumexp, expected[1])
    _check(query, key, value, _lengths(290))  # with the tiles and splits of the device


@pytest.mark.parametrize("target", [AMPERE, HOPPER, BLACKWELL, MI300], ids=str)
def test_tiles_fit(target: Any) -> None:
    for dim in (1, 64, 80, 128, 256):
        for rows in (1, 8, 33, 4096):
            for itemsize in (2, 4):
                tile_m, tile_n, warps, stages = triton_decode.decode_tile(rows, dim, itemsize, target)
                width = max(16, 1 << (dim - 1).bit_length())
                assert (tile_m + 2 * stages * tile_n) * width * itemsize <= target.shared_memory
                assert tile_m >= 16 and tile_n >= 16 and warps in (1, 2, 4, 8)
    assert triton_decode.decode_splits(1, 100_000, 64, target) > 30  # a single sequence fills the device
    assert triton_decode.decode_splits(10_000, 100_000, 64, target) == 1
    assert triton_decode.decode_splits(1, 100, 64, target) == 1
