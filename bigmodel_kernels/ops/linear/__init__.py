"""Linear with activation, dropout, residual and norm: `bigmodel::linear`, its training form and gradient, and
the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.activations import ACTIVATIONS
from bigmodel_kernels.ops.norm import KINDS, check_norm
from bigmodel_kernels.ops.registration import (
    backward_formula,
    call,
    define,
    differentiable,
    draw_seed,
    fake_gradients,
    given,
    gradients,
    no_second_derivative,
    placeholder,
    public,
    register_gradient,
    require_choice,
    require_dropout,
    require_float,
    require_like,
    require_needs,
    require_shape,
    require_vector,
    shape,
)

LAYOUTS = ("linear", "conv1d")


@public
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
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> Tensor:
    """y = dropout(activation(x @ W^T + b)), then + residual if given, then the norm if norm_weight is given.

    x (..., K). weight (N, K) as in nn.Linear, or (K, N) with weight_layout="conv1d" as in GPT-2; bias (N,) or
    None. Several weights (and as many biases, or none) are one projection: their outputs come side by side,
    as Q, K and V do in one product. residual has the shape of the result, (..., sum of N); norm_weight and
    norm_bias (sum of N,). activation: "none", "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu". norm_kind:
    "layer_norm" or "rms_norm", which has no bias. dropout_p: elements are dropped with this chance and the
    others scaled by 1 / (1 - dropout_p). Returns (..., sum of N), contiguous.

    float32, bfloat16, float16 (float64 in the reference), the same for all; everything up to the result is in
    float32 and rounded once. Under autocast all are cast to its dtype. Differentiable once in all tensors; a
    second derivative raises NotImplementedError. Where a gradient is wanted, what the activation and the norm
    were given is kept for it, in the dtype of x; gradients of weights are summed in float32.

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
        norm_kind=norm_kind,
        dropout_p=dropout_p,
    )
    return differentiable("linear", args, kwargs)  # type: ignore[no-any-return]


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
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    args: tuple[Any, ...] = (x, weights, biases, residual, norm_weight, norm_bias)
    if dropout_p:
        args = (*args, draw_seed(dropout_p, x.device))
    return args, {
        "weight_layout": weight_layout,
        "activation": activation,
        "norm_eps": norm_eps,
        **given({"norm_kind": "layer_norm", "dropout_p": 0.0}, norm_kind=norm_kind, dropout_p=dropout_p),
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
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> list[Any]:
    """Raises for what is wrong; returns the shape of the result."""
    require_float("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (); it must have at least one dimension")
    require_choice("weight_layout", weight_layout, LAYOUTS)
    require_choice("activation", activation, ACTIVATIONS)
    require_choice("norm_kind", norm_kind, KINDS)
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
        check_norm(x, size, norm_weight, norm_bias, norm_eps, "norm_", norm_kind)
    result = [*x.shape[:-1], size]
    check_residual(residual, result, x)
    require_dropout(dropout_p, dropout_seed, "x", x)
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
    return backends.run("linear", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return x.new_empty(check(x, *args, **options))


def _run_training(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    check(*args, **options)
    return backends.run("linear_training", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_training(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    size = check(x, weights, biases, residual, norm_weight, *args, **options)
    return (
        x.new_empty(size),
        x.new_empty(size if options.get("activation", "none") != "none" else (0,)),
        x.new_empty(size if norm_weight is not None else (0,)),
    )


def _check_backward(
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
    needs: Sequence[bool],
    **options: Any,
) -> list[Any]:
    """Raises for what is wrong; returns the shapes of all gradients.

    residual is read where prenorm has to be computed again, and may be None otherwise, with a gradient.
    """
    result = check(x, weights, biases, residual, norm_weight, norm_bias, dropout_seed, **options)
    require_shape("grad", grad, result, x)
    require_shape("preactivation", preactivation, result, x)
    require_shape("prenorm", prenorm, result, x)
    names = ["x", "residual", "norm_weight", "norm_bias"]
    names += [f"weights[{i}]" for i in range(len(weights))] + [f"biases[{i}]" for i in range(len(biases))]
    norm = (("norm_weight", norm_weight), ("norm_bias", norm_bias))
    require_needs(needs, names, [name for name, tensor in norm if tensor is None])
    vectors = [t.shape for t in (*weights, *biases)]
    return [x.shape, result, result[-1:], result[-1:], *vectors]


def _run_backward(*args: Any, **options: Any) -> list[Tensor]:
    _check_backward(*args, **options)
    return backends.run("linear_backward", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_backward(grad: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    return fake_gradients(grad, _check_backward(grad, *args, **options), options["needs"])


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, weights, biases, residual, norm_weight, norm_bias, seed = inputs
    ctx.counts, ctx.options, ctx.size = (len(weights), len(biases)), keyword_only_inputs, None
    ctx.save_for_backward(x, *weights, *biases, residual, norm_weight, norm_bias, seed, None, None)


def _setup_context_training(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    x, weights, biases, _, norm_weight, norm_bias, seed = inputs
    _, preactivation, prenorm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(preactivation, prenorm)
    ctx.counts, ctx.options, ctx.size = (len(weights), len(biases)), keyword_only_inputs, x.shape
    ctx.save_for_backward(
        # The gradients of weights read x, and nothing else does; residual is in prenorm.
        x if any(w.requires_grad for w in weights) else placeholder(x, ()),
        *(*weights, *biases, None, norm_weight, norm_bias, seed),
        preactivation if keyword_only_inputs["activation"] != "none" else None,
        prenorm if norm_weight is not None else None,
    )


@backward_formula(7)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor | None, *_: None
) -> tuple[Any, ...]:
    x, *rest, residual, norm_weight, norm_bias, seed, preactivation, prenorm = saved
    count = ctx.counts[0]
    weights, biases = list(rest[:count]), list(rest[count:])
    need_x, need_weights, need_biases, need_residual, need_norm_weight, need_norm_bias, _ = needs
    if grad is None:
        return None, [None] * count, [None] * len(biases), None, None, None, None
    if ctx.size is not None and x.shape != ctx.size:
        x = placeholder(x, ctx.size)
    # Without a norm the gradient of the residual is that of the result, and nothing has to be computed.
    given_on = need_residual and norm_weight is None
    asked = [need_x, need_residual and not given_on, need_norm_weight, need_norm_bias]
    asked += [*need_weights, *need_biases]
    results = gradients(
        call(
            *("linear_backward", grad, x, weights, biases, residual, norm_weight, norm_bias, seed),
            *(preactivation, prenorm),
            **ctx.options,
            needs=asked,
        ),
        asked,
    )
    dx, dresidual, dnorm_weight, dnorm_bias, *dparameters = results
    return (
        dx,
        dparameters[:count],
        dparameters[count:],
        grad if given_on else dresidual,
        dnorm_weight,
        dnorm_bias,
        None,
    )


_TENSORS = (
    "Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual=None, Tensor? norm_weight=None, "
    "Tensor? norm_bias=None, Tensor? dropout_seed=None"
)
_OPTIONS = (
    'str weight_layout="linear", str activation="none", float norm_eps=1e-5, str norm_kind="layer_norm", '
    "float dropout_p=0.0"
)
define(f"linear({_TENSORS}, *, {_OPTIONS}) -> Tensor", _run, _fake, autocast="lower", rows=(0, 3))
define(
    f"linear_training({_TENSORS}, *, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _run_training,
    _fake_training,
    autocast="lower",
    rows=(0, 3),
)
define(
    f"linear_backward(Tensor grad, {_TENSORS}, Tensor? preactivation=None, Tensor? prenorm=None, *, "
    f"{_OPTIONS}, bool[] needs) -> Tensor[]",
    _run_backward,
    _fake_backward,
    rows=(0, 1, 4, 8, 9),
    row_results=(0, 1),
)
register_gradient("linear", _backward, _setup_context)
register_gradient("linear_training", _backward, _setup_context_training)
no_second_derivative("linear_backward", "torch.nn.functional.linear")
