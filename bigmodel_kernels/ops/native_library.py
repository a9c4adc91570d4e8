"""Whether the compiled library can run a call: the part of the answer that all operators share."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(dtype: torch.dtype) -> str | None:
    """None, or the reason why the compiled library cannot work with tensors of this dtype."""
    reason = _missing()
    if reason is None and dtype not in _DTYPES:
        reason = f"it has no {dtype}"
    return reason


@functools.cache
def _library() -> ModuleType | None:
    try:
        return importlib.import_module("bigmodel_kernels._native")
    except ModuleNotFoundError:  # a source tree without the loader; `_missing` says so
        return None


def _missing() -> str | None:
    library = _library()
    if library is None:
        return "the compiled library is not part of this installation"
    return None if library.available() else library.reason()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor with no gaps, as the library wants it; None stays None."""
    return None if tensor is None else tensor.contiguous()
