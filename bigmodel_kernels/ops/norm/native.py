"""LayerNorm by the compiled CPU library."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import contiguous, unavailable


def supports(x: Tensor, *args: object) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return unavailable(x.dtype)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    """See `bigmodel_kernels.layer_norm`."""
    return torch.ops.bigmodel.cpu_layer_norm(
        x.contiguous(), contiguous(weight), contiguous(bias), eps, contiguous(residual)
    )
