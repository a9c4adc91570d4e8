"""Linear with activation, dropout, residual and norm in plain PyTorch: the definition of right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.activations import activate, activation_backward, dropout
from bigmodel_kernels.ops.norm.reference import norm_gradients, normalize
from bigmodel_kernels.ops.registration import compute_dtype, filled


def project(x: Tensor, weight: Tensor, bias: Tensor | None, weight_layout: str) -> Tensor:
    """x @ W^T + b for layout "linear", x @ W + b for "conv1d", in the dtype of x."""
    weight = weight.to(x.dtype)
    if weight_layout == "conv1d":
        weight = weight.t()
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def project_all(x: Tensor, weights: list[Tensor], biases: list[Tensor], weight_layout: str) -> Tensor:
    """The projections of x in the type of computation, side by side."""
    high = x.to(compute_dtype(x.dtype))
    parts = [
        project(high, weight, biases[i] if biases else None, weight_layout)
        for i, weight in enumerate(weights)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> Tensor:
    """See `bigmodel_kernels.linear`."""
    y = activate(project_all(x, weights, biases, weight_layout), activation)
    y = dropout(y, dropout_seed, dropout_p)
    if residual is not None:
        y = y + residual
    if norm_weight is not None:
        y = normalize(y, norm_weight, norm_bias, norm_eps, norm_kind)
    return y.to(x.dtype)


def run_training(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `run`, and what the activation and the norm were given, empty where there is none."""
    preactivation, prenorm = x.new_empty(0), x.new_empty(0)
    z = project_all(x, weights, biases, weight_layout)
    y = activate(z, activation)
    if activation != "none":
        preactivation = z.to(x.dtype)
    y = dropout(y, dropout_seed, dropout_p)
    if residual is not None:
        y = y + residual
    if norm_weight is not None:
        prenorm = y.to(x.dtype)
        y = normalize(y, norm_weight, norm_bias, norm_eps, norm_kind)
    return y.to(x.dtype), preactivation, prenorm


def run_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    preactivation: Tensor | None = None,
    prenorm: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, residual, norm_weight, norm_bias, weights and biases of `bigmodel_kernels.linear`."""
    count = len(weights)
    need_x, need_residual, need_norm_weight, need_norm_bias = needs[:4]
    need_weights, need_biases = needs[4 : 4 + count], needs[4 + count :]
    need_product = need_x or any(needs[4:])
    compute = compute_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    dy: Tensor | None = grad.reshape(-1, grad.shape[-1]).to(compute)
    recompute_norm = norm_weight is not None and prenorm is None
    z = None
    if activation != "none" and (need_product or recompute_norm):
        if preactivation is None:
            z = project_all(rows, weights, biases, weight_layout)
        else:
            z = preactivation.reshape(-1, grad.shape[-1]).to(compute)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None and dy is not None:
        if prenorm is None:
            linear = z if z is not None else project_all(rows, weights, biases, weight_layout)
            y = dropout(activate(linear, activation), dropout_seed, dropout_p)
            if residual is not None:
                y = y + residual.reshape(y.shape)
        else:
            y = prenorm.reshape(-1, grad.shape[-1]).to(compute)
        wanted = (need_product or need_residual, need_norm_weight, need_norm_bias)
        dy, dnorm_weight, dnorm_bias = norm_gradients(
            dy, y, norm_weight, norm_bias, norm_eps, wanted, norm_kind
        )
    dx: Tensor | None = None
    dw: list[Tensor | None] = [None] * count
    db: list[Tensor | None] = [None] * len(biases)
    if need_product and dy is not None:
        dz = dropout(dy, dropout_seed, dropout_p)
        if z is not None:
            dz = activation_backward(dz, z, activation)
        dx, dw, db = projection_backward(dz, rows, weights, weight_layout, need_x, need_weights, need_biases)
        dx = None if dx is None else dx.view(x.shape)
    dresidual = None
    if need_residual and dy is not None:
        dresidual = dy.view(grad.shape)
        if norm_weight is None and grad.dtype == compute:
            dresidual = dresidual.clone()  # a result of an operator shares no memory with its arguments
    return filled((dx, dresidual, dnorm_weight, dnorm_bias, *dw, *db), needs, x)


def projection_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    weight_layout: str,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of x, of each weight and of each bias where needed; x (M, K) in its own dtype, grad (M, sum
    of N) in the type of computation.

    A GPU multiplies half types in half, and sums in float32. A CPU need not have instructions for them, and
    multiplies in float32.
    """
    conv1d = weight_layout == "conv1d"
    dtype = x.dtype if grad.device.type != "cpu" else grad.dtype
    sizes = [w.shape[1 if conv1d else 0] for w in weights]
    db: list[Tensor | None] = [
        part.sum(0) if need else None for part, need in zip(grad.split(sizes, -1), need_biases, strict=False)
    ]
    parts = grad.to(dtype).split(sizes, -1)
    dx: Tensor | None = None
    if need_x:
        matrices = [(w if conv1d else w.t()).to(dtype) for w in weights]
        if dtype != grad.dtype and len(weights) > 1:  # one product, so that a half gradient is rounded once
            parts_joined, matrices = grad.to(dtype), [torch.cat(matrices, 1)]
            dx = parts_joined @ matrices[0].t()
        else:
            dx = parts[0] @ matrices[0].t()
            for part, matrix in zip(parts[1:], matrices[1:], strict=True):
                dx.addmm_(part, matrix.t())
    rows = x.to(dtype) if any(need_weights) else x
    dw: list[Tensor | None] = [
        (rows.t() @ part if conv1d else part.t() @ rows) if need else None
        for part, need in zip(parts, need_weights, strict=True)
    ]
    return dx, dw, db
