"""Feed-forward block: `bigmodel::feed_forward` and its public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.activations import ACTIVATIONS, activate, derivative
from bigmodel_kernels.ops.linear import LAYOUTS, check_residual, check_weight, projection_backward
from bigmodel_kernels.ops.linear.reference import project
from bigmodel_kernels.ops.norm import cast, check_norm, norm_backward
from bigmodel_kernels.ops.norm.reference import normalize
from bigmodel_kernels.ops.registration import (
    backward_formula,
    compute_dtype,
    define,
    require_choice,
    require_float,
    require_vector,
)

NORM_POSITIONS = ("none", "pre", "post")


def feed_forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    weight_layout: str = "linear",
    residual: Tensor | None = None,
    norm_position: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """FFN(x) = activation(x @ W_in^T + b_in) @ W_out^T + b_out, with residual and LayerNorm.

    norm_position: "none": FFN(x) + residual; "post" (BERT): LayerNorm(FFN(x) + residual); "pre" (GPT-2):
    FFN(LayerNorm(x)) + residual. Without residual nothing is added.

    x (..., K). weight_layout "linear": w_in (F, K) and w_out (N, F); "conv1d" (GPT-2): w_in (K, F) and w_out
    (F, N). b_in (F,) and b_out (N,) or None, residual of the shape of the result (..., N); norm_weight and
    norm_bias (N,) for "post" and (K,) for "pre". activation: "none", "gelu", "gelu_tanh", "quick_gelu",
    "relu" or "silu".

    float32, bfloat16, float16 (float64 in the reference), the same for all. Sums are in float32; the
    normalised input of "pre" and the hidden layer are rounded to the dtype, and then the result once. Under
    autocast all are cast to its dtype. Differentiable in all tensors, more than once; the backward computes
    the hidden layer again.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: Attention Is All You Need (Vaswani et al., 2017, arXiv:1706.03762); GELU (arXiv:1606.08415).
    """
    args, kwargs = prepare(
        x,
        w_in,
        b_in,
        w_out,
        b_out,
        activation=activation,
        weight_layout=weight_layout,
        residual=residual,
        norm_position=norm_position,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
    )
    return torch.ops.bigmodel.feed_forward.default(*args, **kwargs)


def prepare(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    weight_layout: str = "linear",
    residual: Tensor | None = None,
    norm_position: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    return (x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias), {
        "activation": activation,
        "weight_layout": weight_layout,
        "norm_position": norm_position,
        "norm_eps": norm_eps,
    }


def check(
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
) -> list[Any]:
    """Raises for what is wrong; returns the shape of the result."""
    require_float("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (); it must have at least one dimension")
    require_choice("activation", activation, ACTIVATIONS)
    require_choice("weight_layout", weight_layout, LAYOUTS)
    require_choice("norm_position", norm_position, NORM_POSITIONS)
    hidden = check_weight("w_in", w_in, x.shape[-1], weight_layout, x)
    size = check_weight("w_out", w_out, hidden, weight_layout, x)
    if b_in is not None:
        require_vector("b_in", b_in, hidden, "the number of features that w_in gives", x)
    if b_out is not None:
        require_vector("b_out", b_out, size, "the number of features that w_out gives", x)
    if norm_position == "none":
        if norm_weight is not None or norm_bias is not None:
            raise ValueError(
                "norm_position='none' with norm_weight or norm_bias; allowed are 'pre' and 'post'"
            )
    else:
        if norm_weight is None:
            raise ValueError(f"norm_weight is None with norm_position={norm_position!r}; it must be a tensor")
        check_norm(
            x, size if norm_position == "post" else x.shape[-1], norm_weight, norm_bias, norm_eps, "norm_"
        )
    result = [*x.shape[:-1], size]
    check_residual(residual, result, x)
    return result


def _run(*args: Any, **options: Any) -> Tensor:
    check(*args, **options)
    return backends.run("feed_forward", args[0].device.type, args, options)


def _fake(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return x.new_empty(check(x, *args, **options))


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


@backward_formula(8)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias = saved
    need_x, need_w_in, need_b_in, need_w_out, need_b_out, need_residual, *need_norm = needs
    layout, activation = ctx.options["weight_layout"], ctx.options["activation"]
    position, eps = ctx.options["norm_position"], ctx.options["norm_eps"]
    compute = compute_dtype(x.dtype)
    source = x.reshape(-1, x.shape[-1])
    rows = source
    if position == "pre":
        rows = normalize(source.to(compute), norm_weight, norm_bias, eps).to(x.dtype)
    need_rows = need_x or (position == "pre" and any(need_norm))
    need_hidden = need_rows or need_w_in or need_b_in
    z = project(rows, w_in, b_in, layout).to(compute)
    hidden = activate(z, activation).to(x.dtype)
    dy: Any = grad.reshape(-1, grad.shape[-1]).to(compute)
    dnorm_weight = dnorm_bias = None
    if position == "post":
        y = project(hidden, w_out, b_out, layout).to(compute)
        if residual is not None:
            y = y + residual.reshape(y.shape).to(compute)
        need_y = need_hidden or need_w_out or need_b_out or need_residual
        dy, dnorm_weight, dnorm_bias = norm_backward(dy, y, norm_weight, norm_bias, eps, (need_y, *need_norm))
    dx = dw_in = db_in = dw_out = db_out = None
    if need_hidden or need_w_out or need_b_out:
        dhidden, (dw_out,), (db_out,) = projection_backward(
            dy.to(x.dtype), hidden, [w_out], layout, need_hidden, [need_w_out], [need_b_out]
        )
        if dhidden is not None:
            dz = (dhidden.to(compute) * derivative(z, activation)).to(x.dtype)
            dx, (dw_in,), (db_in,) = projection_backward(
                dz, rows, [w_in], layout, need_rows, [need_w_in], [need_b_in]
            )
    if position == "pre" and dx is not None:
        dx, dnorm_weight, dnorm_bias = norm_backward(
            dx.to(compute), source.to(compute), norm_weight, norm_bias, eps, (need_x, *need_norm)
        )
    return (
        dx.to(x.dtype).view(x.shape) if need_x and dx is not None else None,
        dw_in,
        db_in,
        dw_out,
        db_out,
        dy.to(x.dtype).view(grad.shape) if need_residual else None,
        cast(dnorm_weight, x) if need_norm[0] else None,
        cast(dnorm_bias, x) if need_norm[1] else None,
    )


define(
    "feed_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, Tensor? residual=None, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, *, str activation, "
    'str weight_layout="linear", str norm_position="none", float norm_eps=1e-5) -> Tensor',
    _run,
    _fake,
    autocast="lower",
)
torch.library.register_autograd("bigmodel::feed_forward", _backward, setup_context=_setup_context)
