"""Whether the compiled library can run a call: the part of the answer that all operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(dtype: torch.dtype) -> str | None:
    """None, or the reason why the compiled library cannot work with tensors of this dtype."""
    reason = None if _native.is_pretending() else _native.reason()
    if reason is None and dtype not in _DTYPES:
        reason = f"it has no {dtype}"
    return reason


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor with no gaps, as the library wants it; None stays None."""
    return None if tensor is None else tensor.contiguous()


def lacking(operator: str, dtype: torch.dtype) -> str | None:
    """None, or the reason why the compiled library cannot run this operator of its own."""
    reason = unavailable(dtype)
    if reason is None and not _native.is_pretending() and not hasattr(torch.ops.bigmodel, operator):
        reason = f"it has no {operator}: it was built from older sources"
    return reason


def shaped(tensor: Tensor) -> Tensor:
    """The tensor with no gaps; one without memory, whose values are not read, is not filled either."""
    if tensor.dim() and not any(tensor.stride()) and tensor.numel() > 1:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return tensor.contiguous()
