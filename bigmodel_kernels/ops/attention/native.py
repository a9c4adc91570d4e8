"""Attention by the compiled CPU library."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention.reference import cached
from bigmodel_kernels.ops.native_library import contiguous, lacking


def supports(query: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_attention_backward", query.dtype)


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
    return torch.ops.bigmodel.cpu_attention.default(  # type: ignore[no-any-return]
        *(query, key, value, contiguous(key_padding_mask), bias),
        *(contiguous(cu_seqlens_q), contiguous(cu_seqlens_k), dropout_seed if dropout_p else None),
        *(contiguous(alibi_slopes), contiguous(sinks)),
        *(max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_left, window_right, softcap),
        dropout_p,
    )


def supports_backward(
    grad_out: Tensor, grad_logsumexp: Tensor | None, query: Tensor, *args: Any, **options: Any
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return supports(query)


def run_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
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
    bias_requires_grad: bool = False,
    sinks_require_grad: bool = False,
    deterministic: bool = False,
    side_by_side: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `bigmodel::attention_backward`. Deterministic always: each sum belongs to one task.

    `side_by_side`: the first three are parts of one tensor.
    """
    dq, dk, dv, wide_dbias, wide_dsinks = torch.ops.bigmodel.cpu_attention_backward.default(
        *(grad_out, contiguous(grad_logsumexp), query, key, value, out, logsumexp.contiguous()),
        *(contiguous(key_padding_mask), bias),
        *(contiguous(cu_seqlens_q), contiguous(cu_seqlens_k), dropout_seed if dropout_p else None),
        *(contiguous(alibi_slopes), contiguous(sinks)),
        *(max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_left, window_right, softcap),
        *(dropout_p, bias_requires_grad, sinks_require_grad, side_by_side),
    )
    if side_by_side:
        dq, dk, dv = dq.split([t.shape[1] for t in (query, key, value)], 1)
    dbias, dsinks = query.new_empty(0), query.new_empty(0)
    if bias is not None and bias_requires_grad:
        dbias = bias_gradient(wide_dbias, bias)
    if sinks is not None and sinks_require_grad:
        dsinks = wide_dsinks.sum(0).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def bias_gradient(wide: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias from that of (some of) the logits (B, H, Sq, Sk) that it was broadcast to."""
    return wide.sum_to_size((1,) * (4 - bias.dim()) + bias.shape).view(bias.shape).to(bias.dtype)


supports_decode = supports


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
