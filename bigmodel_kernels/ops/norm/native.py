"""LayerNorm by the compiled CPU library."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import contiguous, unavailable


def supports(x: Tensor, *args: object, dropout_p: float = 0.0) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return unavailable(x.dtype) or ("it has no dropout here" if dropout_p else None)


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """See `bigmodel_kernels.layer_norm`."""
    return torch.ops.bigmodel.cpu_layer_norm(  # type: ignore[no-any-return]
        x.contiguous(), contiguous(weight), contiguous(bias), eps, contiguous(residual)
    )
