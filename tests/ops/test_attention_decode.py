"""Attention against a key-value cache, contiguous and paged: each sequence is attention to what it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.ops.attention.decode import prepare


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged(size: int, *caches: Tensor) -> tuple[Tensor, ...]:
    """Contiguous caches (B, Hkv, S, D) in shuffled pages of `size` keys, and their table; what no sequence
    holds is NaN.
    """
    batch, heads, keys, dim = caches[0].shape
    blocks = -(-keys // size)
    table = torch.randperm(batch * blocks + 3)[: batch * blocks].view(batch, blocks)
    results = []
    for cache in caches:
        pages = cache.new_full((batch * blocks + 3, heads, size, dim), math.nan)
        padded = torch.nn.functional.pad(cache, (0, 0, 0, blocks * size - keys), value=math.nan)
        pages[table] = padded.view(batch, heads, blocks, size, dim).transpose(1, 2)
        results.append(pages)
    return (*results, table.to(torch.int32))


def formula(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], **options: Any) -> Any:
    """Each sequence alone, by the formula that the operators are verified with."""
    slopes = options.pop("alibi_slopes", None)
    results = [
        verify.attention_formula(
            query[b : b + 1],
            key[b : b + 1, :, :n],
            value[b : b + 1, :, :n],
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b],
            **{"is_causal": True, **options},
        )
        for b, n in enumerate(lengths)
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"is_causal": False},
    "window": {"window": (6, None)},
    "softcap": {"softcap": 4.0},
    "scale": {"softmax_scale": 0.7},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi of each sequence": {"alibi_slopes": torch.rand(4, 4)},
    "sinks": {"sinks": torch.randn(4)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pages", [None, 5], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name: str, pages: int | None, dtype: torch.dtype, cpu_backend: str) -> None:
    lengths = [29, 7, 7, 0]  # neighbours of one length, fewer keys than a page, and nothing at all
    query = torch.randn(4, 4, 3, 16).to(dtype)
    key, value = (torch.randn(4, 2, 29, 16).to(dtype) for _ in range(2))
    arguments: tuple[Any, ...] = (key, value, int32(*lengths))
    if pages is not None:
        key_pages, value_pages, table = paged(pages, key, value)
        arguments = (key_pages, value_pages, int32(*lengths), table)
    options = OPTIONS[name]
    with backends.use(cpu_backend):
        chosen = bk.explain("attention_decode", query, *arguments, **options)
        if chosen.error and "the compiled library has no" in chosen.error:
            pytest.skip(chosen.error)
        out, logsumexp = bk.attention_decode(query, *arguments, **options, return_logsumexp=True)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert logsumexp.dtype == torch.float32 and logsumexp.shape == (4, 4, 3)
    eager = formula(query, key, value, lengths, **options)
    exact = formula(*map(double, (query, key, value)), lengths, **{k: double(v) for k, v in options.items()})
    for got, of_eager, ref in zip((out, logsumexp), eager, exact, strict=True):
        verdict = verify.compare(got, of_eager, ref)
        assert verdict.ok, str(verdict)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    rows=st.integers(1, 4),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    dim=st.integers(1, 40),
    page=st.integers(1, 17),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_pages_of_any_size_are_the_contiguous_cache(
    backend: str,
    lengths: list[int],
    rows: int,
    group: int,
    kv_heads: int,
    dim: int,
    page: int,
    is_causal: bool,
    seed: int,
) -> None:
    if backend == "native" and (reason := _native.reason()):
        pytest.skip(reason)
    torch.manual_seed(seed)
    query = torch.randn(len(lengths), group * kv_heads, rows, dim)
    cache = torch.randn(len(lengths), kv_heads, 40, dim)
    pages, table = paged(page, cache)
    with backends.use(backend):
        whole = bk.attention_decode(query, cache, cache, int32(*lengths), is_causal=is_causal)
        out = bk.attention_decode(query, pages, pages, int32(*lengths), table, is_causal=is_causal)
    torch.testing.assert_close(out, whole)
    expected, _ = formula(query, cache, cache, lengths, is_causal=is_causal)
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-5)


def test_generation_token_by_token_is_attention_at_once(cpu_backend: str) -> None:
    query, key, value = (torch.randn(2, 4, 12, 16) for _ in range(3))
    key, value = key[:, :2], value[:, :2]
    with backends.use(cpu_backend):
        expected = bk.attention(query, key, value, is_causal=True)
        for n in range(12):
            out = bk.attention_decode(query[:, :, n : n + 1], key, value, int32(n + 1, n + 1))
            torch.testing.assert_close(out, expected[:, :, n : n + 1])
        out = bk.attention_decode(query[:, :, 4:], key, value, int32(12, 12))
        torch.testing.assert_close(out, expected[:, :, 4:])


def test_caches_of_any_strides(cpu_backend: str) -> None:
    """Keys and values beside each other, keys before heads, and pages that are stored key by key."""
    query = torch.randn(2, 4, 1, 16)
    store = torch.randn(2, 30, 2, 2, 16)
    key, value = store.permute(3, 0, 2, 1, 4)
    lengths = int32(30, 11)
    with backends.use(cpu_backend):
        out = bk.attention_decode(query, key, value, lengths)
        torch.testing.assert_close(
            out, bk.attention_decode(query, key.contiguous(), value.contiguous(), lengths)
        )
        pages, table = paged(8, key)
        stored = pages.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(bk.attention_decode(query, stored, stored, lengths, table),
                                   bk.attention_decode(query, key, key, lengths))  # fmt: skip


@pytest.mark.parametrize("with_pages", [False, True], ids=["contiguous", "paged"])
def test_opcheck(with_pages: bool, cpu_backend: str) -> None:
    cache = torch.randn(2, 2, 9, 8)
    arguments: tuple[Any, ...] = (cache, cache, int32(9, 4))
    if with_pages:
        pages, table = paged(4, cache)
        arguments = (pages, pages, int32(9, 4), table)
    args, kwargs = prepare(torch.randn(2, 4, 1, 8), *arguments)
    with backends.use(cpu_backend):
        torch.library.opcheck(torch.ops.bigmodel.attention_decode.default, args, kwargs)


def test_compile_without_a_break() -> None:
    torch._dynamo.reset()
    query, cache, lengths = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), int32(9, 4)

    def function(*tensors: Tensor) -> Tensor:
        out = bk.attention_decode(*tensors)
        assert isinstance(out, Tensor)
        return out + 1

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(query, cache, cache, lengths), function(query, cache, cache, lengths)
        )


def test_autocast_leaves_it_alone(cpu_backend: str) -> None:
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16)
    arguments = (query, key, key, int32(9, 4))
    with backends.use(cpu_backend):
        expected = bk.attention_decode(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(bk.attention_decode(*arguments), expected)


def test_no_gradient() -> None:
    query, cache = torch.randn(1, 2, 1, 8, requires_grad=True), torch.randn(1, 2, 9, 8)
    out = bk.attention_decode(query, cache, cache, int32(9))
    assert isinstance(out, Tensor)
    with pytest.raises(NotImplementedError, match=r"attention_decode has no gradient.* train with"):
        out.sum().backward()


Q, CACHE, LENGTHS = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 9, 16), int32(9, 3)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((Q.int(), CACHE, CACHE, LENGTHS), {}, TypeError, "query has dtype torch.int32; allowed are"),
    ((Q[0], CACHE, CACHE, LENGTHS), {}, ValueError, r"query has shape \(4, 1, 16\); it must have 4"),
    ((Q, CACHE[0], CACHE[0], LENGTHS), {}, ValueError, r"key_cache has shape .* \(B, Hkv, Smax, D\)"),
    ((Q, CACHE[0], CACHE[0], LENGTHS, TABLE), {}, ValueError, r"\(pages, Hkv, page_size, D\)"),
    ((Q, CACHE.half(), CACHE, LENGTHS), {}, TypeError, "key_cache has dtype torch.float16"),
    ((Q, CACHE, CACHE.half(), LENGTHS), {}, TypeError, "value_cache has dtype torch.float16"),
    ((Q, CACHE, CACHE[:, :, :8], LENGTHS), {}, ValueError, r"value_cache has shape \(2, 2, 8, 16\)"),
    ((Q[..., :8], CACHE, CACHE, LENGTHS), {}, ValueError, "key_cache has head_dim 16; .* query, 8"),
    ((Q[:, :3], CACHE, CACHE, LENGTHS), {}, ValueError, "key_cache has 2 heads; they must divide the 3"),
    ((Q, CACHE[:1], CACHE[:1], LENGTHS), {}, ValueError, "key_cache has batch 1; .* query, 2"),
    ((Q, CACHE, CACHE, LENGTHS.long()), {}, TypeError, "cache_seqlens has dtype torch.int64"),
    ((Q, CACHE, CACHE, LENGTHS[:1]), {}, ValueError, r"cache_seqlens has shape \(1,\); it must be \(2,\)"),
    ((Q, CACHE, CACHE, int32(9, 10)), {}, ValueError, r"cache_seqlens\[1\] is 10; allowed are 0 to 9"),
    ((Q, CACHE, CACHE, int32(-1, 9)), {}, ValueError, r"cache_seqlens\[0\] is -1; allowed are 0 to 9"),
    ((Q, CACHE, CACHE, LENGTHS, TABLE.long()), {}, TypeError, "block_table has dtype torch.int64"),
    ((Q, CACHE, CACHE, LENGTHS, TABLE[0]), {}, ValueError, r"block_table has shape \(3,\); .* \(2, blocks\)"),
    ((Q, CACHE, CACHE, int32(28, 3), TABLE), {},
     ValueError, r"cache_seqlens\[0\] is 28; allowed are 0 to 27"),
    ((Q, CACHE, CACHE, int32(0, 10), TABLE + int32(0, 2, 2)), {},
     ValueError, r"block_table\[1, 1\] is 2; allowed are 0 to 1"),
    ((Q, CACHE, CACHE, LENGTHS.to("meta")), {}, ValueError, "cache_seqlens is on meta"),
    ((Q, CACHE.transpose(2, 3), CACHE.transpose(2, 3), LENGTHS), {}, ValueError, "key_cache has head_dim 9"),
    ((torch.zeros(2, 4, 1, 9), CACHE.transpose(2, 3), CACHE.transpose(2, 3), LENGTHS), {},
     ValueError, "key_cache has stride 16 in its last dimension; it must be 1"),
    ((Q, CACHE, CACHE, LENGTHS), {"window": 3}, TypeError, "window=3 must be a pair"),
    ((Q, CACHE, CACHE, LENGTHS), {"softcap": -1.0}, ValueError, "softcap=-1.0 is out of range"),
    ((Q, CACHE, CACHE, LENGTHS), {"softmax_scale": math.nan}, ValueError, "softmax_scale=nan"),
    ((Q, CACHE, CACHE, LENGTHS), {"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \(2,\)"),
    ((Q, CACHE, CACHE, LENGTHS), {"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes has shape"),
]  # fmt: skip


@pytest.mark.parametrize(
    "args, options, kind, message", BAD, ids=[f"{i}: {b[3][:40]}" for i, b in enumerate(BAD)]
)
def test_bad_arguments(
    args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        bk.attention_decode(*args, **options)
    if "window" not in options:
        op_args, op_options = prepare(*args, **options)
        with pytest.raises(kind, match=message):
            torch.ops.bigmodel.attention_decode(*op_args, **op_options)
