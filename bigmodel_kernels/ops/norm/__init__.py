"""LayerNorm and RMSNorm with dropout and residual: `bigmodel::layer_norm`, `bigmodel::rms_norm`, their
gradient `bigmodel::norm_backward`, and the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bigmodel_kernels import backends
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

KINDS = ("layer_norm", "rms_norm")


@public
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """LayerNorm over the last dimension of t = dropout(x) + residual:
    (t - mean) / sqrt(var + eps) * weight + bias.

    x and residual (..., N) of the same shape, weight and bias (N,) or None. Returns (..., N), contiguous.
    dropout_p: elements of x are dropped with this chance and the others scaled by 1 / (1 - dropout_p).
    float32, bfloat16, float16 (float64 in the reference), the same for all; the sum and the statistics are in
    float32 and the result is rounded once. Under autocast all are cast to float32, torch's own rule for
    layer_norm. Differentiable once in all tensors; a second derivative raises NotImplementedError.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: Layer Normalization (Ba, Kiros and Hinton, 2016, arXiv:1607.06450).
    """
    args, kwargs = prepare(x, weight, bias, eps, residual, dropout_p=dropout_p)
    return differentiable("layer_norm", args, kwargs)  # type: ignore[no-any-return]


def prepare(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    if not dropout_p:
        return (x, weight, bias, eps, residual), {}
    return (x, weight, bias, eps, residual, draw_seed(dropout_p, x.device)), {"dropout_p": dropout_p}


@public
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> Tensor:
    """RMSNorm over the last dimension of t = dropout(x) + residual:
    t / sqrt(mean(t^2) + eps) * (weight + weight_offset).

    weight_offset is 1 in Gemma, whose weights are kept as their distance from 1. All else, and the errors, as
    in `layer_norm`.

    Source: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019, arXiv:1910.07467).
    """
    args, kwargs = prepare_rms_norm(
        x, weight, eps, residual, dropout_p=dropout_p, weight_offset=weight_offset
    )
    return differentiable("rms_norm", args, kwargs)  # type: ignore[no-any-return]


def prepare_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    options = given({"weight_offset": 0.0}, weight_offset=weight_offset)
    if not dropout_p:
        return (x, weight, eps, residual), options
    seed = draw_seed(dropout_p, x.device)
    return (x, weight, eps, residual, seed), {"dropout_p": dropout_p, **options}


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    kind: str = "layer_norm",
) -> None:
    """Raises for what is wrong."""
    require_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x has shape {shape(x)}; it must have at least one dimension, and the last must not be 0"
        )
    check_norm(x, x.shape[-1], weight, bias, eps, prefix="", kind=kind)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {shape(residual)}; it must be that of x, {shape(x)}")
        require_like("residual", residual, "x", x)
    require_dropout(dropout_p, dropout_seed, "x", x)


def check_norm(
    x: Tensor,
    size: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    prefix: str,
    kind: str = "layer_norm",
) -> None:
    """Parameters of a norm over `size` features of the dtype and device of x."""
    require_choice(prefix + "kind", kind, KINDS)
    if weight is not None:
        require_vector(prefix + "weight", weight, size, "the number of normalised features", x)
    elif bias is not None:
        raise ValueError(f"{prefix}bias is given and {prefix}weight is None; a bias alone is not allowed")
    if bias is not None:
        if kind == "rms_norm":
            raise ValueError(f"{prefix}bias is given with {prefix}kind='rms_norm', which has none")
        require_vector(prefix + "bias", bias, size, "the number of normalised features", x)
    if not eps >= 0:
        raise ValueError(f"{prefix}eps={eps} is out of range; it must not be negative")


def _run(*args: Any, **options: Any) -> Tensor:
    check(*args, **options)
    return backends.run("layer_norm", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake(x: Tensor, *args: Any, **options: Any) -> Tensor:
    check(x, *args, **options)
    return x.new_empty(x.shape)


def _run_rms_norm(x: Tensor, weight: Tensor | None, *args: Any, **options: Any) -> Tensor:
    check(x, weight, None, *args, **options, kind="rms_norm")
    return backends.run("rms_norm", x.device.type, (x, weight, *args), options)  # type: ignore[no-any-return]


def _fake_rms_norm(x: Tensor, weight: Tensor | None, *args: Any, **options: Any) -> Tensor:
    check(x, weight, None, *args, **options, kind="rms_norm")
    return x.new_empty(x.shape)


_BACKWARD = ("x", "residual", "weight", "bias")


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *args: Any,
    eps: float,
    needs: Sequence[bool],
    **options: Any,
) -> None:
    check(x, weight, bias, eps, *args, **options)
    require_shape("grad", grad, x.shape, x)
    named = (("weight", weight), ("bias", bias))
    require_needs(needs, _BACKWARD, [name for name, tensor in named if tensor is None])


def _run_backward(*args: Any, **options: Any) -> list[Tensor]:
    _check_backward(*args, **options)
    return backends.run("norm_backward", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_backward(grad: Tensor, x: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    _check_backward(grad, x, *args, **options)
    size = [x.shape[-1]]
    return fake_gradients(x, (x.shape, x.shape, size, size), options["needs"])


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, weight, bias, ctx.eps, residual, seed = inputs
    ctx.kind, ctx.options = "layer_norm", keyword_only_inputs
    ctx.save_for_backward(x, weight, bias, residual, seed)


def _setup_context_rms_norm(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, weight, ctx.eps, residual, seed = inputs
    ctx.kind, ctx.options = "rms_norm", keyword_only_inputs
    ctx.save_for_backward(x, weight, None, residual, seed)


def _gradients(ctx: Any, saved: tuple[Any, ...], needs: tuple[bool, ...], grad: Tensor) -> list[Any]:
    """Gradients of x, residual, weight and bias."""
    # Without dropout those of x and residual are one tensor.
    same = not ctx.options["dropout_p"] and needs[1]
    asked = [needs[0] or same, needs[1] and not same, needs[2], needs[3]]
    results = call("norm_backward", grad, *saved, kind=ctx.kind, eps=ctx.eps, **ctx.options, needs=asked)
    dx, dresidual, dweight, dbias = gradients(results, asked)
    return [dx if needs[0] else None, dx if same else dresidual, dweight, dbias]


@backward_formula(6)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias, _, need_residual, _ = needs
    dx, dresidual, dweight, dbias = _gradients(
        ctx, saved, (need_x, need_residual, need_weight, need_bias), grad
    )
    return dx, dweight, dbias, None, dresidual, None


@backward_formula(5)
def _backward_rms_norm(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    need_x, need_weight, _, need_residual, _ = needs
    dx, dresidual, dweight, _ = _gradients(ctx, saved, (need_x, need_residual, need_weight, False), grad)
    return dx, dweight, None, dresidual, None


define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual=None, "
    "Tensor? dropout_seed=None, *, float dropout_p=0.0) -> Tensor",
    _run,
    _fake,
    autocast="float32",
    rows=(0, 4),
)
define(
    "rms_norm(Tensor x, Tensor? weight, float eps, Tensor? residual=None, Tensor? dropout_seed=None, *, "
    "float dropout_p=0.0, float weight_offset=0.0) -> Tensor",
    _run_rms_norm,
    _fake_rms_norm,
    autocast="float32",
    rows=(0, 3),
)
define(
    "norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual=None, "
    "Tensor? dropout_seed=None, *, str kind, float eps, float dropout_p=0.0, float weight_offset=0.0, "
    "bool[] needs) -> Tensor[]",
    _run_backward,
    _fake_backward,
    rows=(0, 1, 4),
    row_results=(0, 1),
)
register_gradient("layer_norm", _backward, _setup_context)
register_gradient("rms_norm", _backward_rms_norm, _setup_context_rms_norm)
no_second_derivative("norm_backward", "torch.nn.functional.layer_norm or rms_norm")
