"""LayerNorm in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.registration import compute_dtype


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x, which is already in the type of computation."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    """See `bigmodel_kernels.layer_norm`."""
    total = x.to(compute_dtype(x.dtype))
    if residual is not None:
        total = total + residual
    return normalize(total, weight, bias, eps).to(x.dtype)
