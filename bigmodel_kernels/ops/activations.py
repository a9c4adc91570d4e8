"""Activations of linear and feed_forward, and their derivatives, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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


def derivative(x: Tensor, name: str) -> Tensor:
    """The activation's derivative at x, itself differentiable."""
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        tanh = torch.tanh(c * (x + 0.044715 * x * x * x))
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * 0.044715 * x * x)
    if name in ("quick_gelu", "silu"):
        slope = 1.702 if name == "quick_gelu" else 1.0
        gate = torch.sigmoid(slope * x)
        return gate * (1 + slope * x * (1 - gate))
    if name == "relu":
        return (x > 0).to(x.dtype)
    return torch.ones_like(x)
