"""Gradient of LayerNorm and RMSNorm by the compiled CUDA library: one launch, and one for sums over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.cuda_library import lacking, unmeasured
from bigmodel_kernels.ops.linear.cuda import aligned, rows_of

#: It holds a row and its gradient in the registers of one block.
MAX_COLUMNS_BACKWARD = 4096


def supports_backward(grad: Tensor, x: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if reason := lacking(x):
        return reason
    columns = x.shape[-1]
    if columns % 8:
        return f"the last dimension is {columns}, not a multiple of 8"
    if columns > MAX_COLUMNS_BACKWARD:
        return f"the last dimension is {columns}; its kernel holds rows of up to {MAX_COLUMNS_BACKWARD}"
    return None


only_when_forced_backward = unmeasured


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    kind: str,
    eps: float,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of [x, residual, weight, bias]; an empty tensor (0,) where not needed."""
    *results, _ = torch.ops.bigmodel.cuda_norm_backward.default(
        rows_of(grad),
        rows_of(x),
        None if weight is None else aligned(weight),
        None if residual is None else rows_of(residual),
        None if dropout_seed is None else dropout_seed.reshape(()),
        kind=kind,
        eps=eps,
        dropout_p=dropout_p,
        weight_offset=weight_offset,
        needs=[*needs, False],
    )
    for i in range(2):
        if needs[i]:
            results[i] = results[i].view(x.shape)
    return results
