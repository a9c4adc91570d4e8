"""Attention by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import contiguous, unavailable


def supports(query: Tensor, *args: Any, dropout_p: float = 0.0, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return unavailable(query.dtype) or ("dropout runs in the reference only" if dropout_p else None)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
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
    return torch.ops.bigmodel.cpu_attention.default(
        query,
        key,
        value,
        contiguous(key_padding_mask),
        bias,
        contiguous(cu_seqlens_q),
        contiguous(cu_seqlens_k),
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        is_causal,
        window_left,
        window_right,
        softcap,
    )
