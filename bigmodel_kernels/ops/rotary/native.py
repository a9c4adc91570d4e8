"""Rotary position embedding by the compiled CPU library."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import lacking


def supports(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_rotary", query.dtype)


def run(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.rotary`."""
    return torch.ops.bigmodel.cpu_rotary.default(query, key, cos, sin, interleaved)  # type: ignore[no-any-return]
