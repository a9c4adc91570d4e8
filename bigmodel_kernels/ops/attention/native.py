"""Attention by the compiled CPU library."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention import reference
from bigmodel_kernels.ops.attention.reference import cached
from bigmodel_kernels.ops.native_library import contiguous, unavailable
from bigmodel_kernels.ops.philox import keep_attention


@functools.cache
def _arguments() -> frozenset[str]:
    """The arguments of the operator in the library that is loaded, which may be older than this file."""
    return frozenset(a.name for a in torch.ops.bigmodel.cpu_attention.default._schema.arguments)


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    **options: Any,
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if reason := unavailable(query.dtype):
        return reason
    dropout = dropout_seed if dropout_p else None
    for name, given in (("dropout_seed", dropout), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if given is not None and name not in _arguments():
            return f"the compiled library has no {name.removesuffix('_seed')} in attention"
    return None


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    softmax_scale: float,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.attention`."""
    tensors = (
        query,
        key,
        value,
        contiguous(key_padding_mask),
        bias,
        contiguous(cu_seqlens_q),
        contiguous(cu_seqlens_k),
    )
    options = (
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        is_causal,
        window_left,
        window_right,
        softcap,
    )
    if "dropout_seed" not in _arguments():
        return torch.ops.bigmodel.cpu_attention.default(*tensors, *options)
    more = (dropout_seed if dropout_p else None, contiguous(alibi_slopes), contiguous(sinks))
    return torch.ops.bigmodel.cpu_attention.default(*tensors, *more, *options, dropout_p)


def supports_backward(
    grad_out: Tensor, grad_logsumexp: Tensor | None, query: Tensor, *args: Any, **options: Any
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return unavailable(query.dtype)


def run_backward(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient: torch's products of matrices over blocks of rows, as in the reference, with the dropped
    elements from the library, which makes them many times faster than torch's integer arithmetic does.
    """
    has_dropout = hasattr(torch.ops.bigmodel, "cpu_philox")
    return reference.run_backward(*args, **options, keep=_keep if has_dropout else keep_attention)


def _keep(
    seed: Tensor, p: float, sequence: int, heads: int, rows: slice, keys: slice, like: Tensor
) -> Tensor:
    """See `philox.keep_attention`."""
    result = torch.empty_like(like)
    for b in range(like.shape[0]):
        for head in range(heads):
            _, kept, _ = torch.ops.bigmodel.cpu_philox.default(
                seed, rows.stop - rows.start, keys.stop, "attention", rows.start, head, sequence + b, p
            )
            result[b, head] = kept[:, keys.start :]
    return result.mul_(1 / (1 - p))


def supports_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return supports(query, key_cache, value_cache, alibi_slopes=alibi_slopes, sinks=sinks)


def run_decode(
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
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.attention_decode`.

    One call for each sequence, on a view of a contiguous cache; neighbours of one length are one call. The
    pages of a paged cache are gathered first.
    """
    batch, heads, rows, dim = query.shape
    out = query.new_empty((batch, rows, heads, dim)).transpose(1, 2)
    logsumexp = query.new_empty((batch, heads, rows), dtype=torch.float32)
    first = 0
    for length, group in itertools.groupby(cache_seqlens.tolist()):
        last = first + len(list(group))
        for begin, end in (
            [(first, last)] if block_table is None else [(b, b + 1) for b in range(first, last)]
        ):
            key, value = (
                c[begin:end, :, :length] if block_table is None else cached(c, block_table, begin, length)
                for c in (key_cache, value_cache)
            )
            slopes = (
                alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[begin:end]
            )
            out[begin:end], logsumexp[begin:end] = run(
                query[begin:end],
                key,
                value,
                alibi_slopes=slopes,
                sinks=sinks,
                softmax_scale=softmax_scale,
                is_causal=is_causal,
                window_left=window_left,
                window_right=window_right,
                softcap=softcap,
            )
        first = last
    return out, logsumexp
