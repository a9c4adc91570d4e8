"""LayerNorm with residual: `bigmodel::layer_norm` and its public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.registration import (
    backward_formula,
    compute_dtype,
    define,
    require_float,
    require_like,
    require_vector,
    shape,
)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    """LayerNorm over the last dimension of x + residual: (t - mean) / sqrt(var + eps) * weight + bias.

    x and residual (..., N) of the same shape, weight and bias (N,) or None. Returns (..., N), contiguous.
    float32, bfloat16, float16 (float64 in the reference), the same for all; the sum and the statistics are in
    float32 and the result is rounded once. Under autocast all are cast to float32, torch's own rule for
    layer_norm. Differentiable in all tensors, more than once.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: Layer Normalization (Ba, Kiros and Hinton, 2016, arXiv:1607.06450).
    """
    return torch.ops.bigmodel.layer_norm.default(x, weight, bias, eps, residual)


def prepare(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, residual: Tensor | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    return (x, weight, bias, eps, residual), {}


def check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> None:
    require_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x has shape {shape(x)}; it must have at least one dimension, and the last must not be 0"
        )
    check_norm(x, x.shape[-1], weight, bias, eps, prefix="")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {shape(residual)}; it must be that of x, {shape(x)}")
        require_like("residual", residual, "x", x)


def check_norm(
    x: Tensor, size: Any, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: str
) -> None:
    """Parameters of a norm over `size` features of the dtype and device of x."""
    if weight is not None:
        require_vector(prefix + "weight", weight, size, "the number of normalised features", x)
    elif bias is not None:
        raise ValueError(f"{prefix}bias is given and {prefix}weight is None; a bias alone is not allowed")
    if bias is not None:
        require_vector(prefix + "bias", bias, size, "the number of normalised features", x)
    if not eps >= 0:
        raise ValueError(f"{prefix}eps={eps} is out of range; it must not be negative")


def _run(*args: Any) -> Tensor:
    check(*args)
    return backends.run("layer_norm", args[0].device.type, args, {})


def _fake(x: Tensor, *args: Any) -> Tensor:
    check(x, *args)
    return x.new_empty(x.shape)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias where needed; all in the type of computation, x and grad too."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    size = [x.shape[-1]]
    _, mean, rstd = torch.ops.aten.native_layer_norm.default(x, size, weight, bias, eps)
    return torch.ops.aten.native_layer_norm_backward.default(
        grad, x, size, mean, rstd, weight, bias, list(needs)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, residual = inputs
    ctx.save_for_backward(x, weight, bias, residual)


@backward_formula(5)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual = saved
    need_x, need_weight, need_bias, _, need_residual = needs
    compute = compute_dtype(x.dtype)
    total = x.to(compute) if residual is None else x.to(compute) + residual.to(compute)
    needs = (need_x or need_residual, need_weight, need_bias)
    dx, dweight, dbias = norm_backward(grad.to(compute), total, weight, bias, ctx.eps, needs)
    dx = cast(dx, x)
    return (
        dx if need_x else None,
        cast(dweight, x) if need_weight else None,
        cast(dbias, x) if need_bias else None,
        None,
        dx if need_residual else None,
    )


def cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """The gradient in the dtype of its tensor."""
    return None if gradient is None else gradient.to(like.dtype)


define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual=None) -> Tensor",
    _run,
    _fake,
    autocast="float32",
)
torch.library.register_autograd("bigmodel::layer_norm", _backward, setup_context=_setup_context)
