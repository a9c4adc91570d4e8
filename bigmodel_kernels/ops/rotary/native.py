"""Rotary position embedding by the compiled CPU library."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import unavailable


def supports(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if reason := unavailable(query.dtype):
        return reason
    if not hasattr(torch.ops.bigmodel, "cpu_rotary"):
        return "the compiled library has no rotary"
    return None


def run(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.rotary`."""
    return torch.ops.bigmodel.cpu_rotary.default(query, key, cos, sin, interleaved)  # type: ignore[no-any-return]
