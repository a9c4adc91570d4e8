"""Feed-forward block by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.linear.native import packed
from bigmodel_kernels.ops.native_library import contiguous, unavailable


def supports(x: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return unavailable(x.dtype)


def run(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    activation: str,
    weight_layout: str = "linear",
    norm_position: str = "none",
    norm_eps: float = 1e-5,
) -> Tensor:
    """See `bigmodel_kernels.feed_forward`."""
    return torch.ops.bigmodel.cpu_feed_forward(
        x.contiguous(),
        packed([w_in], weight_layout),
        contiguous(b_in),
        packed([w_out], weight_layout),
        contiguous(b_out),
        activation,
        contiguous(residual),
        norm_position,
        contiguous(norm_weight),
        contiguous(norm_bias),
        norm_eps,
    )
