"""Attention of a few new tokens against a key-value cache: `bigmodel::attention_decode`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.attention.checks import check_head_terms, check_numbers, window_sides
from bigmodel_kernels.ops.registration import (
    call,
    compute_dtype,
    define,
    public,
    register_gradient,
    require_device,
    require_float,
    require_like,
    shape,
)


@public
def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last few tokens of each sequence to all that its cache holds.

    The keys and values of the new tokens are in the cache already: sequence b has cache_seqlens[b] keys, and
    the last Sq of them belong to its queries. Everything else is as in `attention`, query i of sequence b
    standing at key i + cache_seqlens[b] - Sq. The result is (B, H, Sq, D), laid out in memory as
    (B, Sq, H, D).

    Args:
      query: (B, H, Sq, D); Sq is 1 for plain decoding, more for speculation or a chunk of a prompt.
      key_cache, value_cache: contiguous cache (B, Hkv, Smax, D), or, with a block table, pages
        (pages, Hkv, page_size, D). Any strides with a contiguous last dimension, so that a cache stored as
        (pages, page_size, Hkv, D) is passed transposed, without a copy. H is a multiple of Hkv.
      cache_seqlens: int32 (B,), 0 to Smax, or to blocks * page_size. On a GPU the values are not read to be
        checked, which would wait for it.
      block_table: int32 (B, blocks): keys page_size * n to page_size * (n + 1) of sequence b lie in page
        block_table[b, n]. Entries past the end of a sequence are never read (paged attention: Kwon et al.,
        2023, arXiv:2309.06180).
      is_causal, softmax_scale, window, softcap, alibi_slopes, sinks, return_logsumexp: as in `attention`.

    dtypes float32, bfloat16 and float16 (float64 in the reference), the same for query and both caches;
    autocast leaves them alone. There is no gradient: a backward through the result raises NotImplementedError
    (train with `attention`).

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: split over the keys, Flash-Decoding (Dao et al., 2023).
    """
    args, kwargs = prepare(
        query,
        key_cache,
        value_cache,
        cache_seqlens,
        block_table,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    out, logsumexp = call("attention_decode", *args, **kwargs)
    return (out, logsumexp) if return_logsumexp else out


def prepare(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_logsumexp: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(max(1, query.shape[-1])) if query.dim() else 1.0
    left, right = window_sides(window)
    return (query, key_cache, value_cache, cache_seqlens, block_table, alibi_slopes, sinks), {
        "softmax_scale": softmax_scale,
        "is_causal": is_causal,
        "window_left": left,
        "window_right": right,
        "softcap": softcap,
    }


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    softmax_scale: float,
    is_causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
) -> None:
    require_float("query", query)
    require_like("key_cache", key_cache, "query", query)
    require_like("value_cache", value_cache, "query", query)
    cache = "(pages, Hkv, page_size, D)" if block_table is not None else "(B, Hkv, Smax, D)"
    for name, tensor, form in (("query", query, "(B, H, Sq, D)"), ("key_cache", key_cache, cache)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {shape(tensor)}; it must have 4 dimensions, {form}")
    batch, heads, _, dim = query.shape
    if not 1 <= dim <= 256:
        raise ValueError(f"query has head_dim {dim}; allowed are 1 to 256")
    if value_cache.shape != key_cache.shape:
        raise ValueError(
            f"value_cache has shape {shape(value_cache)}; it must be that of key_cache, {shape(key_cache)}"
        )
    if key_cache.shape[-1] != dim:
        raise ValueError(f"key_cache has head_dim {key_cache.shape[-1]}; it must be that of query, {dim}")
    kv_heads = key_cache.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key_cache has {kv_heads} heads; they must divide the {heads} heads of query")
    for name, numbers, rank in (("cache_seqlens", cache_seqlens, 1), ("block_table", block_table, 2)):
        if numbers is None:
            continue
        if numbers.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {numbers.dtype}; it must be torch.int32")
        if numbers.dim() != rank or numbers.shape[0] != batch:
            form = f"({batch},)" if rank == 1 else f"({batch}, blocks)"
            raise ValueError(f"{name} has shape {shape(numbers)}; it must be {form}")
        require_device(name, numbers, "query", query)
    if block_table is None and key_cache.shape[0] != batch:
        raise ValueError(f"key_cache has batch {key_cache.shape[0]}; it must be that of query, {batch}")
    check_numbers(softmax_scale, window_left, window_right, softcap)
    check_head_terms(query, heads, batch, alibi_slopes, sinks)


def _check_values(key_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None) -> None:
    """Lengths and pages that lie in the cache, where reading them costs nothing."""
    if cache_seqlens.device.type != "cpu":
        return
    pages, _, size, _ = key_cache.shape
    capacity = size if block_table is None else size * block_table.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"cache_seqlens[{b}] is {length}; allowed are 0 to {capacity}")
        if block_table is not None:
            for n, page in enumerate(block_table[b, : -(-length // max(1, size))].tolist()):
                if not 0 <= page < pages:
                    raise ValueError(f"block_table[{b}, {n}] is {page}; allowed are 0 to {pages - 1}")


def _run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _check(*args, **options)
    query, key_cache, value_cache, cache_seqlens, *rest = args
    _check_values(key_cache, cache_seqlens, rest[0] if rest else None)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:  # a cache is not to be copied at every token
            raise ValueError(f"{name} has stride {cache.stride(-1)} in its last dimension; it must be 1")
    if query.shape[-1] > 1 and query.stride(-1) != 1:
        query = query.contiguous()
    args = (query, key_cache, value_cache, cache_seqlens, *rest)
    return backends.run("attention_decode", query.device.type, args, options)


def _fake(query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _check(query, *args, **options)
    batch, heads, rows, dim = query.shape
    out = query.new_empty((batch, rows, heads, dim)).transpose(1, 2)
    return out, query.new_empty((batch, heads, rows), dtype=compute_dtype(query.dtype))


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "bigmodel::attention_decode has no gradient, because it reads a cache; train with "
        "bigmodel_kernels.attention"
    )


define(
    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, "
    "Tensor? block_table=None, Tensor? alibi_slopes=None, Tensor? sinks=None, *, float softmax_scale, "
    "bool is_causal=True, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)
register_gradient("attention_decode", _no_gradient)
