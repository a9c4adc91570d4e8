"""The CUDA decode kernel, run in the emulator, against float64 by the rule of `numerics`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plain_attention import plain
from torch import Tensor

from bigmodel_kernels.ops.attention import prepare as prepare_attention
from bigmodel_kernels.ops.attention import reference
from bigmodel_kernels.ops.attention.decode import prepare
from bigmodel_kernels.verify import compare

pytestmark = pytest.mark.usefixtures("library")
DTYPES = [torch.bfloat16, torch.float16]


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Cache:
    """Queries and a cache (B, Hkv, S, D) with NaN where no sequence has keys."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, queries: int, dim: int, dtype: torch.dtype
    ) -> None:
        self.lengths = lengths
        self.query = torch.randn(len(lengths), heads, queries, dim).to(dtype)
        self.key, self.value = (
            torch.full((len(lengths), kv_heads, max(*lengths, 1), dim), math.nan, dtype=dtype)
            for _ in range(2)
        )
        for b, n in enumerate(lengths):
            self.key[b, :, :n], self.value[b, :, :n] = torch.randn(2, kv_heads, n, dim).to(dtype)

    def arguments(self, page_size: int | None = None) -> tuple[Tensor, ...]:
        """Of the operator; with a page size the cache in shuffled pages, as (pages, page_size, Hkv, D) in
        memory, whose table names no page where a sequence needs none."""
        lengths = int32(*self.lengths)
        if page_size is None:
            return self.query, self.key, self.value, lengths
        batch, heads, keys, dim = self.key.shape
        blocks = -(-keys // page_size)
        table = torch.randperm(batch * blocks + 2)[: batch * blocks].view(batch, blocks)
        caches = []
        for cache in (self.key, self.value):
            pages = cache.new_full((batch * blocks + 2, page_size, heads, dim), math.nan).transpose(1, 2)
            padded = torch.nn.functional.pad(cache, (0, 0, 0, blocks * page_size - keys), value=math.nan)
            pages[table] = padded.view(batch, heads, blocks, page_size, dim).transpose(1, 2)
            caches.append(pages)
        for b, n in enumerate(self.lengths):
            table[b, -(-n // page_size) :] = 2**31 - 1
        return self.query, *caches, lengths, table.to(torch.int32)


def emulated(
    *tensors: Tensor, splits: int = 0, seed: int = 0, counters: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    args, kwargs = prepare(*tensors, **options)
    if counters is None:
        counters = torch.zeros(args[0].numel(), dtype=torch.int32)  # more than there are tiles
    torch.ops.bigmodel_emulator.set_seed(seed)
    result: tuple[Tensor, Tensor] = torch.ops.bigmodel_emulator.cuda_attention_decode(
        *args[:4], counters, *args[4:], **kwargs, splits=splits
    )
    assert (counters == 0).all(), "left as they were found"
    return result


def check(cache: Cache, page_size: int | None = None, splits: int = 0, seed: int = 0, **options: Any) -> None:
    """The output by the numerics rule, and the logsumexp."""
    args, kwargs = prepare(*cache.arguments(), **options)
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    ref, ref_lse = reference.run_decode(*wide, **kwargs)
    eager = torch.empty_like(cache.query)
    for b, n in enumerate(cache.lengths):
        mine = {"is_causal": True, **options}
        slopes = options.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            mine["alibi_slopes"] = slopes[b]
        tensors = (cache.query[b : b + 1], cache.key[b : b + 1, :, :n], cache.value[b : b + 1, :, :n])
        one_args, one_kwargs = prepare_attention(*tensors, **mine)
        eager[b] = plain(*one_args, **one_kwargs)[0]
    out, lse = emulated(*cache.arguments(page_size), splits=splits, seed=seed, **options)
    verdict = compare(out, eager, ref)
    assert verdict.ok, verdict
    finite = ref_lse.isfinite()
    assert (lse.isfinite() == finite).all()
    assert torch.allclose(lse[finite].double(), ref_lse[finite], atol=2e-5, rtol=2e-5)


LENGTHS = [300, 0, 1, 77]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dim", [8, 32, 40, 64, 96, 128, 192, 256])
def test_head_dims(dim: int, splits: int) -> None:
    check(Cache([140, 33], 2, 1, 1, dim, DTYPES[dim // 8 % 2]), splits=splits)


@pytest.mark.parametrize("page_size", [None, 1, 16, 50])
@pytest.mark.parametrize("splits", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_pages_and_splits(page_size: int | None, splits: int, dtype: torch.dtype) -> None:
    """Of 40 splits most have no key; a sequence of none gives zeros."""
    check(Cache(LENGTHS, 4, 2, 1, 64, dtype), page_size, splits)


# Query heads, kv heads, new tokens: rows that fill a tile in part, whole, and several.
@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (12, 2, 1), (16, 1, 1), (6, 2, 3), (20, 1, 1), (3, 1, 17)], ids=str
)
@pytest.mark.parametrize("splits", [1, 3])
def test_groups_and_tokens(shape: tuple[int, int, int], splits: int) -> None:
    heads, kv_heads, queries = shape
    check(Cache([130, 2, 40], heads, kv_heads, queries, 64, torch.bfloat16), 16, splits)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False},
        {"window": (30, None)},
        {"window": (70, 1), "is_causal": False},
        {"window": (0, 0)},
        {"softcap": 4.0},
        {"softmax_scale": 8.0},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        {"alibi_slopes": torch.rand(4, 4), "softcap": 9.0},
        {"sinks": torch.randn(4)},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("splits", [1, 3])
def test_options(options: dict[str, Any], splits: int) -> None:
    check(Cache(LENGTHS, 4, 2, 3, 64, torch.float16), 16, splits, **options)


def test_a_sequence_without_keys_gives_zeros_and_its_sink() -> None:
    cache = Cache([0, 90], 2, 1, 2, 32, torch.bfloat16)
    out, lse = emulated(*cache.arguments(), splits=2)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    sinks = torch.tensor([0.5, 30.0])
    out, lse = emulated(*cache.arguments(), splits=2, sinks=sinks)
    assert (out[0] == 0).all() and torch.allclose(lse[0, :, 0], sinks)


def test_the_same_bits_whatever_the_order_of_arrival() -> None:
    """One set of counters serves every call; with a seed, blocks and threads come in any order."""
    arguments = Cache(LENGTHS, 4, 1, 2, 64, torch.bfloat16).arguments(16)
    counters = torch.zeros(8, dtype=torch.int32)
    first = emulated(*arguments, splits=5, counters=counters)
    for seed in (0, 1, 2, 3):
        again = emulated(*arguments, splits=5, counters=counters, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_the_splits_leave_is_written_before_it_is_read() -> None:
    """With new memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        check(Cache(LENGTHS, 4, 2, 1, 64, torch.bfloat16), 16, splits=9)
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_that_lead_outside_are_not_followed() -> None:
    """Lengths past the capacity are cut to it, and a page that is none has zeros; the emulator would report
    any access outside."""
    cache = Cache([64, 64], 2, 1, 1, 32, torch.float16)
    query, key, value, lengths, table = cache.arguments(16)
    expected = emulated(query, key, value, lengths, table)
    long = emulated(query, key, value, int32(65, 2**31 - 1), table, is_causal=False)
    assert all(torch.equal(a, b) for a, b in zip(expected, long, strict=True))
    none, lse = emulated(query, key, value, int32(-5, -(2**31)), table)
    assert (none == 0).all() and (lse == -torch.inf).all()
    for bad in (key.shape[0], -1, 2**31 - 1, -(2**31)):
        table[1, 2] = bad
        out, lse = emulated(query, key, value, lengths, table)
        assert torch.equal(out[0], expected[0][0]) and out.isfinite().all()


def test_the_shapes_choose_the_splits() -> None:
    """On the emulator's three multiprocessors, one tile with room for 600 keys gets three."""
    arguments = Cache([600], 16, 1, 1, 32, torch.float16).arguments()
    assert not torch.equal(emulated(*arguments)[1], emulated(*arguments, splits=1)[1])
    assert all(
        torch.equal(a, b) for a, b in zip(emulated(*arguments), emulated(*arguments, splits=3), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counters": torch.zeros(1, dtype=torch.int32)}, r"counters: shape \(1,\) must be \(2,\)"),
        ({"counters": torch.zeros(2)}, "counters: wrong dtype"),
        ({"splits": -1}, "splits: -1"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "cache_seqlens: shape"),
        ({"table": torch.zeros(3, 2, dtype=torch.int32)}, "block_table: shape"),
        ({"value": torch.zeros(2, 1, 9, 32, dtype=torch.float16)}, "value_cache: shape"),
        ({"key": torch.zeros(2, 1, 10, 64, dtype=torch.float16)}, "key_cache: head_dim"),
        ({"query": torch.zeros(2, 1, 1, 32)}, "query: dtype"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    cache = torch.zeros(2, 1, 10, 32, dtype=torch.float16)
    given: dict[str, Any] = {
        "query": cache[:, :, :1],
        "key": cache,
        "value": cache,
        "lengths": int32(10, 10),
        "counters": torch.zeros(2, dtype=torch.int32),
        "table": None,
        "splits": 1,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bigmodel_emulator.cuda_attention_decode(
            *(given[name] for name in ("query", "key", "value", "lengths", "counters", "table")),
            softmax_scale=1.0,
            splits=given["splits"],
        )
