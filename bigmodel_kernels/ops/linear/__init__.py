"""Linear with activation, residual and LayerNorm: `bigmodel::linear` and its public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.activations import ACTIVATIONS, activate, derivative
from bigmodel_kernels.ops.linear.reference import project
from bigmodel_kernels.ops.norm import cast, check_norm, norm_backward
from bigmodel_kernels.ops.registration import (
    backward_formula,
    compute_dtype,
    define,
    require_choice,
    require_float,
    require_like,
    require_vector,
    shape,
)

LAYOUTS = ("linear", "conv1d")


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """y = activation(x @ W^T + b), then + residual if given, then LayerNorm if norm_weight is given.

    x (..., K). weight (N, K) as in nn.Linear, or (K, N) with weight_layout="conv1d" as in GPT-2; bias (N,) or
    None. Several weights (and as many biases, or none) are one projection: their outputs come side by side,
    as Q, K and V do in one product. residual has the shape of the result, (..., sum of N); norm_weight and
    norm_bias (sum of N,). activation: "none", "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu". Returns
    (..., sum of N), contiguous.

    float32, bfloat16, float16 (float64 in the reference), the same for all; everything up to the result is in
    float32 and rounded once. Under autocast all are cast to its dtype. Differentiable in all tensors, more
    than once.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.
    """
    args, kwargs = prepare(
        x,
        weight,
        bias,
        weight_layout=weight_layout,
        activation=activation,
        residual=residual,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
    )
    return torch.ops.bigmodel.linear.default(*args, **kwargs)


def prepare(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    return (x, weights, biases, residual, norm_weight, norm_bias), {
        "weight_layout": weight_layout,
        "activation": activation,
        "norm_eps": norm_eps,
    }


def check_weight(name: str, weight: Tensor, features: Any, weight_layout: str, x: Tensor) -> Any:
    """A matrix that takes `features` in; returns how many it gives out."""
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {shape(weight)}; it must have 2 dimensions")
    size_in, size_out = weight.shape if weight_layout == "conv1d" else (weight.shape[1], weight.shape[0])
    if size_in != features:
        raise ValueError(
            f"{name} has shape {shape(weight)}, which with weight_layout={weight_layout!r} takes {size_in} "
            f"features; its input has {features}"
        )
    require_like(name, weight, "x", x)
    return size_out


def check(
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
) -> list[Any]:
    """Raises for what is wrong; returns the shape of the result."""
    require_float("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (); it must have at least one dimension")
    require_choice("weight_layout", weight_layout, LAYOUTS)
    require_choice("activation", activation, ACTIVATIONS)
    if not weights:
        raise ValueError("weight is an empty list; it must hold at least one tensor")
    if biases and len(biases) != len(weights):
        raise ValueError(
            f"bias holds {len(biases)} tensors; it must hold none or as many as weight, {len(weights)}"
        )
    size = 0
    for i, weight in enumerate(weights):
        out = check_weight("weight", weight, x.shape[-1], weight_layout, x)
        if biases:
            require_vector("bias", biases[i], out, "the number of features that its weight gives", x)
        size = size + out
    if norm_weight is not None or norm_bias is not None:
        check_norm(x, size, norm_weight, norm_bias, norm_eps, prefix="norm_")
    result = [*x.shape[:-1], size]
    check_residual(residual, result, x)
    return result


def check_residual(residual: Tensor | None, result: list[Any], x: Tensor) -> None:
    if residual is not None:
        if list(residual.shape) != result:
            raise ValueError(
                f"residual has shape {shape(residual)}; it must be that of the result, {tuple(result)}"
            )
        require_like("residual", residual, "x", x)


def _run(*args: Any, **options: Any) -> Tensor:
    check(*args, **options)
    return backends.run("linear", args[0].device.type, args, options)


def _fake(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return x.new_empty(check(x, *args, **options))


def projection_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    weight_layout: str,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of x, of each weight and of each bias where needed; x (M, K), grad (M, sum of N)."""
    conv1d = weight_layout == "conv1d"
    parts = grad.split([w.shape[1 if conv1d else 0] for w in weights], -1)
    dx = None
    if need_x:  # one product, so that a half gradient is rounded once
        whole = weights[0] if len(weights) == 1 else torch.cat(weights, 1 if conv1d else 0)
        dx = grad @ (whole.t() if conv1d else whole)
    dw: list[Tensor | None] = [
        (x.t() @ part if conv1d else part.t() @ x) if need else None
        for part, need in zip(parts, need_weights, strict=True)
    ]
    db: list[Tensor | None] = [
        part.sum(0, dtype=compute_dtype(part.dtype)).to(part.dtype) if need else None
        for part, need in zip(parts, need_biases, strict=False)
    ]
    return dx, dw, db


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, weights, biases, residual, norm_weight, norm_bias = inputs
    ctx.counts = (len(weights), len(biases))
    ctx.save_for_backward(x, *weights, *biases, residual, norm_weight, norm_bias)
    ctx.options = keyword_only_inputs


@backward_formula(6)
def _backward(ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    x, *rest, residual, norm_weight, norm_bias = saved
    weights, biases = list(rest[: ctx.counts[0]]), list(rest[ctx.counts[0] :])
    need_x, need_weights, need_biases, need_residual, need_norm_weight, need_norm_bias = needs
    layout, activation = ctx.options["weight_layout"], ctx.options["activation"]
    compute = compute_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    z = None
    if activation != "none" or norm_weight is not None:  # the product again, rather than keeping it
        z = torch.cat(
            [project(rows, w, biases[i] if biases else None, layout) for i, w in enumerate(weights)], -1
        ).to(compute)
    dy: Any = grad.reshape(-1, grad.shape[-1]).to(compute)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None and z is not None:
        y = activate(z, activation)
        if residual is not None:
            y = y + residual.reshape(y.shape).to(compute)
        need_y = need_x or need_residual or any(need_weights) or any(need_biases)
        dy, dnorm_weight, dnorm_bias = norm_backward(
            dy, y, norm_weight, norm_bias, ctx.options["norm_eps"], (need_y, need_norm_weight, need_norm_bias)
        )
    dx: Tensor | None = None
    dw: list[Tensor | None] = [None] * len(weights)
    db: list[Tensor | None] = [None] * len(biases)
    if need_x or any(need_weights) or any(need_biases):
        dz = dy if z is None or activation == "none" else dy * derivative(z, activation)
        dx, dw, db = projection_backward(
            dz.to(x.dtype), rows, weights, layout, need_x, need_weights, need_biases
        )
    return (
        None if dx is None else dx.view(x.shape),
        dw,
        db,
        dy.to(x.dtype).view(grad.shape) if need_residual else None,
        cast(dnorm_weight, x) if need_norm_weight else None,
        cast(dnorm_bias, x) if need_norm_bias else None,
    )


define(
    "linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual=None, Tensor? norm_weight=None, "
    'Tensor? norm_bias=None, *, str weight_layout="linear", str activation="none", float norm_eps=1e-5) '
    "-> Tensor",
    _run,
    _fake,
    autocast="lower",
)
torch.library.register_autograd("bigmodel::linear", _backward, setup_context=_setup_context)
