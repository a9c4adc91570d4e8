"""Attention by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import unavailable


def supports(query: Tensor, *args: Any, dropout_p: float = 0.0, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return unavailable(query.dtype) or ("dropout runs in the reference only" if dropout_p else None)


def run(query: Tensor, key: Tensor, value: Tensor, *args: Any, dropout_p: float = 0.0, **options: Any) -> Any:
    """See `bigmodel_kernels.attention`."""
    names = ("key_padding_mask", "bias", "cu_seqlens_q", "cu_seqlens_k")
    tensors = dict(zip(names, args, strict=False))
    return torch.ops.bigmodel.cpu_attention(query, key, value, **tensors, **options)
