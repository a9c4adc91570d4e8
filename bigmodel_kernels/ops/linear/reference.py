"""Linear with activation, residual and LayerNorm in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.activations import activate
from bigmodel_kernels.ops.norm.reference import normalize
from bigmodel_kernels.ops.registration import compute_dtype


def project(x: Tensor, weight: Tensor, bias: Tensor | None, weight_layout: str) -> Tensor:
    """x @ W^T + b for layout "linear", x @ W + b for "conv1d", in the dtype of x."""
    weight = weight.to(x.dtype)
    if weight_layout == "conv1d":
        weight = weight.t()
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
) -> Tensor:
    """See `bigmodel_kernels.linear`."""
    high = x.to(compute_dtype(x.dtype))
    parts = [
        project(high, weight, biases[i] if biases else None, weight_layout)
        for i, weight in enumerate(weights)
    ]
    y = activate(parts[0] if len(parts) == 1 else torch.cat(parts, -1), activation)
    if residual is not None:
        y = y + residual
    if norm_weight is not None:
        y = normalize(y, norm_weight, norm_bias, norm_eps)
    return y.to(x.dtype)
