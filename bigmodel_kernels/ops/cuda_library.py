"""What the operators that call the compiled CUDA library have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _native

_DTYPES = (torch.bfloat16, torch.float16)


def lacking(tensor: Tensor) -> str | None:
    """Why the library cannot run on tensors of this dtype and device, or None where it can."""
    if tensor.dtype not in _DTYPES:
        return f"it has no {tensor.dtype}; its tensor cores take bfloat16 and float16"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return f"{torch.cuda.get_device_name(tensor.device)} is older than sm_80"
    return _native.cuda_reason()


def readable(tensor: Tensor) -> bool:
    """Rows are copied 16 bytes at a time."""
    strides = [s for s, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides)
