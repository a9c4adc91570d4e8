"""LayerNorm and RMSNorm with dropout and residual in plain PyTorch: the definition of right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.activations import dropout
from bigmodel_kernels.ops.registration import compute_dtype, filled


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer_norm",
    weight_offset: float = 0.0,
) -> Tensor:
    """The norm over the last dimension of x, which is already in the type of computation."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * (weight + weight_offset)


def norm_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: tuple[bool, bool, bool],
    kind: str = "layer_norm",
    weight_offset: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias of `normalize` where needed, in the type of computation, which grad and
    x (..., N) have.

    LayerNorm is torch's own backward. RMSNorm, with n = x / rms and g = grad * weight: dx = (g - n *
    mean(g * n)) / rms, dweight = sum(grad * n).
    """
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    need_x, need_weight, need_bias = needs[0], needs[1] and weight is not None, needs[2] and bias is not None
    size = [x.shape[-1]]
    if kind == "layer_norm":
        if not (need_x or need_weight):  # statistics are not needed for the bias
            rows = grad.reshape(-1, grad.shape[-1])
            return None, None, rows.sum(0) if need_bias else None
        _, mean, rstd = torch.ops.aten.native_layer_norm.default(x, size, weight, bias, eps)
        return torch.ops.aten.native_layer_norm_backward.default(
            grad, x, size, mean, rstd, weight, bias, [need_x, need_weight, need_bias]
        )
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * inverse
    dx = None
    if need_x:
        g = grad if weight is None else grad * (weight + weight_offset)
        mean = (g * normed).mean(-1, keepdim=True)
        dx = torch.addcmul(g, normed, mean, value=-1).mul_(inverse)
    dweight = (grad * normed).reshape(-1, grad.shape[-1]).sum(0) if need_weight else None
    return dx, dweight, None


def total(x: Tensor, residual: Tensor | None, dropout_seed: Tensor | None, dropout_p: float) -> Tensor:
    """dropout(x) + residual in the type of computation: what the norm is of."""
    y = dropout(x.to(compute_dtype(x.dtype)), dropout_seed, dropout_p)
    return y if residual is None else y + residual


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
    return normalize(total(x, residual, dropout_seed, dropout_p), weight, bias, eps).to(x.dtype)


def run_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> Tensor:
    """See `bigmodel_kernels.rms_norm`."""
    y = total(x, residual, dropout_seed, dropout_p)
    return normalize(y, weight, None, eps, "rms_norm", weight_offset).to(x.dtype)


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
    """Gradients of x, residual, weight and bias of `layer_norm` or `rms_norm`."""
    need_x, need_residual, need_weight, need_bias = needs
    y = total(x, residual, dropout_seed, dropout_p)
    dy, dweight, dbias = norm_gradients(
        grad.to(y.dtype), y, weight, bias, eps, (need_x or need_residual, need_weight, need_bias), kind,
        weight_offset,
    )  # fmt: skip
    dx = None if dy is None or not need_x else dropout(dy, dropout_seed, dropout_p)
    if need_residual and dx is dy and dy is not None and dy.dtype == x.dtype:
        dy = dy.clone()  # results of an operator share no memory
    return filled((dx, dy, dweight, dbias), needs, x)
