"""Statistics and probabilities of attention by the compiled CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention_maps.reference import of_heads
from bigmodel_kernels.ops.native_library import contiguous, lacking

#: `most_top_keys` of csrc/kernels.h
MOST_TOP_KEYS = 64


def supports_statistics(query: Tensor, *args: Any, top_k: int = 0, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if top_k > MOST_TOP_KEYS:
        return f"top_k={top_k}: it keeps at most {MOST_TOP_KEYS} in order"
    return lacking("cpu_attention_statistics", query.dtype)


def run_statistics(*args: Any, top_k: int = 0, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `bigmodel_kernels.attention_statistics`."""
    tensors, numbers = _arguments(*args, **options)
    return torch.ops.bigmodel.cpu_attention_statistics.default(*tensors, *numbers, top_k)  # type: ignore[no-any-return]


def supports_probabilities(query: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_attention_probabilities", query.dtype)


def run_probabilities(
    *args: Any, heads: Sequence[int] | None = None, queries: Sequence[int] | None = None, **options: Any
) -> Tensor:
    """See `bigmodel_kernels.attention_probabilities`."""
    tensors, numbers = _arguments(*args, **options)
    query, key, key_mask, query_mask, bias, cu_seqlens_q, cu_seqlens_k, slopes, sinks = tensors
    if heads is not None:
        query, key, bias, slopes, sinks = of_heads(heads, query, key, bias, slopes, sinks)
    chosen = None
    if queries is not None:
        total = query.shape[0] if cu_seqlens_q is not None else query.shape[2]
        chosen = torch.tensor([q % total for q in queries], dtype=torch.int64)
    return torch.ops.bigmodel.cpu_attention_probabilities.default(  # type: ignore[no-any-return]
        *(query, key, key_mask, query_mask, bias, cu_seqlens_q, cu_seqlens_k, slopes, sinks, chosen),
        *numbers,
    )


def _arguments(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
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
) -> tuple[tuple[Any, ...], tuple[int | float, ...]]:
    """What both operators take, in the library's order: tensors, and numbers."""
    tensors = (
        *(query, key, contiguous(key_padding_mask), contiguous(query_padding_mask), bias),
        *(contiguous(cu_seqlens_q), contiguous(cu_seqlens_k), contiguous(alibi_slopes), contiguous(sinks)),
    )
    return tensors, (
        *(max_seqlen_q, max_seqlen_k, softmax_scale, is_causal),
        *(window_left, window_right, softcap),
    )
