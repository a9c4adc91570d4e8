"""Activations and dropout of hidden states, and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.philox import keep_elements

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


def activate(x: Tensor, name: str) -> Tensor:
    """The activation in the dtype of x. quick_gelu is x * sigmoid(1.702 x), as in CLIP."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    return x


def activation_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """grad times the activation's derivative at x, both in the type of computation."""
    if name in ("gelu", "gelu_tanh"):
        approximate = "tanh" if name == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward.default(grad, x, approximate=approximate)
    if name == "silu":
        return torch.ops.aten.silu_backward.default(grad, x)
    if name == "relu":
        return torch.ops.aten.threshold_backward.default(grad, x, 0)
    if name == "quick_gelu":
        gate = torch.sigmoid(1.702 * x)
        return grad * (gate * (1 + 1.702 * x * (1 - gate)))
    return grad


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x (..., N) with elements dropped by their place and the others scaled by 1 / (1 - p).

    The gradient is the same function of the gradient, with the same seed.
    """
    if seed is None or not p or x.numel() == 0:
        return x
    columns = x.shape[-1]
    keep = keep_elements(seed, p, x.numel() // columns, columns, dtype=x.dtype, device=x.device)
    return x * keep.view(x.shape)
