"""Whether the compiled library can run a call: the part of the answer that all operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(dtype: torch.dtype) -> str | None:
    """None, or the reason why the compiled library cannot work with tensors of this dtype."""
    reason = _native.reason()
    if reason is None and dtype not in _DTYPES:
        reason = f"it has no {dtype}"
    return reason


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor with no gaps, as the library wants it; None stays None."""
    return None if tensor is None else tensor.contiguous()
