"""The last linear layer and cross-entropy in one, without the logits: `bigmodel::linear_cross_entropy`, its
training form and gradient, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.registration import (
    backward_formula,
    call,
    compute_dtype,
    define,
    differentiable,
    fake_gradients,
    gradients,
    no_second_derivative,
    public,
    register_gradient,
    require_choice,
    require_device,
    require_float,
    require_like,
    require_needs,
    require_vector,
    shape,
    wants_gradient,
)

REDUCTIONS = ("mean", "sum", "none")


@public
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x @ W^T + b, target), without ever holding the logits of all rows.

    x (..., K), weight (V, K), bias (V,) or None, target int64 of the shape of x without its last dimension,
    with values in 0 ... V - 1, or ignore_index for rows that do not count. label_smoothing in [0, 1]: that
    part of the target is spread evenly over all V classes. reduction "mean" is over the rows that count (nan
    when there are none), "sum" adds them up, and "none" gives losses of the shape of target, 0 where ignored.
    All three as in torch.nn.functional.cross_entropy.

    x and weight and bias float32, bfloat16, float16 (float64 in the reference), the same for all. Logits are
    summed in float32 and never rounded to half; the result is float32 (float64 for float64). Under autocast
    all are cast to its dtype. Where a gradient is wanted with "mean" or "sum", the gradients are made in the
    forward pass, from each chunk's logits: nothing is computed twice. Differentiable once in x, weight and
    bias; a second derivative raises NotImplementedError.

    Raises IndexError for a target out of range (on a GPU the device reports it), TypeError or ValueError
    otherwise, naming the argument, its value and what is allowed.

    Source: Cut Your Losses in Large-Vocabulary Language Models (Wijmans et al., 2024, arXiv:2411.09009);
    gradients in the forward pass: Liger Kernel (Hsu et al., 2024, arXiv:2410.10989); label smoothing:
    Rethinking the Inception Architecture (Szegedy et al., 2015, arXiv:1512.00567).
    """
    args, kwargs = prepare(
        x,
        weight,
        target,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if reduction in ("mean", "sum") and wants_gradient(args):
        needs = [t is not None and t.requires_grad for t in (args[0], weight, bias)]
        results = torch.ops.bigmodel.linear_cross_entropy_training.default(*args, **kwargs, needs=needs)
        return results[0]  # type: ignore[no-any-return]
    loss, _ = differentiable("linear_cross_entropy", args, kwargs)
    return loss.view(target.shape) if reduction == "none" else loss  # type: ignore[no-any-return]


def prepare(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    if x.dim() == 0 or target.shape != x.shape[:-1]:
        raise ValueError(
            f"target has shape {shape(target)}; it must be that of x without its last dimension, "
            f"and x has shape {shape(x)}"
        )
    rows = target.numel()
    return (x.reshape(rows, x.shape[-1]), weight, target.reshape(rows), bias), {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }


def check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> None:
    """Everything that shapes, dtypes and devices tell."""
    require_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {shape(x)}; it must have 2 dimensions")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight has shape {shape(weight)}; it must be (classes, {x.shape[1]}), with at least one class "
            "and the features of x"
        )
    require_like("weight", weight, "x", x)
    if bias is not None:
        require_vector("bias", bias, weight.shape[0], "the number of rows of weight", x)
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; allowed is torch.int64")
    if target.dim() != 1 or target.shape[0] != x.shape[0]:
        raise ValueError(f"target has shape {shape(target)}; it must be ({x.shape[0]},), the rows of x")
    require_device("target", target, "x", x)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"label_smoothing={label_smoothing} is out of range; allowed is 0 <= label_smoothing <= 1"
        )
    require_choice("reduction", reduction, REDUCTIONS)


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Targets out of range on the CPU; on a GPU reading them would wait for the device."""
    if target.device.type != "cpu" or target.numel() == 0:
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        raise IndexError(
            f"target holds {int(target[wrong][0])}; allowed are 0 to {classes - 1} and "
            f"ignore_index={ignore_index}"
        )


def _checked(*args: Any, **options: Any) -> None:
    check(*args, **options)
    _check_range(args[2], args[1].shape[0], options.get("ignore_index", -100))


def _run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _checked(*args, **options)
    return backends.run("linear_cross_entropy", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    check(x, *args, **options)
    dtype, rows = compute_dtype(x.dtype), (x.shape[0],)
    loss = x.new_empty(rows if options.get("reduction", "mean") == "none" else (), dtype=dtype)
    return loss, x.new_empty(rows, dtype=dtype)


_GRADIENTS = ("x", "weight", "bias")


def _check_training(*args: Any, needs: Sequence[bool], **options: Any) -> None:
    check(*args, **options)
    if options.get("reduction", "mean") == "none":
        raise ValueError("reduction='none' is not allowed here: gradients of 1 for each row are needed later")
    _check_needs(needs, args[3] if len(args) > 3 else None)


def _check_needs(needs: Sequence[bool], bias: Tensor | None) -> None:
    require_needs(needs, _GRADIENTS, ["bias"] if bias is None else [])


def _fake_gradients(x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    return fake_gradients(x, (x.shape, weight.shape, weight.shape[:1]), needs)


def _run_training(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    _check_training(*args, **options)
    _check_range(args[2], args[1].shape[0], options.get("ignore_index", -100))
    return backends.run("linear_cross_entropy_training", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_training(
    x: Tensor, weight: Tensor, *args: Any, needs: Sequence[bool], **options: Any
) -> tuple[Tensor, ...]:
    _check_training(x, weight, *args, needs=needs, **options)
    return (*_fake(x, weight, *args, **options), *_fake_gradients(x, weight, needs))


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    *,
    needs: Sequence[bool],
    **options: Any,
) -> None:
    check(x, weight, target, bias, **options)
    for name, tensor in (("grad", grad), ("logsumexp", logsumexp)):
        if tensor.shape != target.shape or tensor.dtype != compute_dtype(x.dtype):
            raise ValueError(
                f"{name} has shape {shape(tensor)} and dtype {tensor.dtype}; it must be {shape(target)} and "
                f"{compute_dtype(x.dtype)}"
            )
        require_device(name, tensor, "x", x)
    _check_needs(needs, bias)


def _run_backward(*args: Any, **options: Any) -> list[Tensor]:
    _check_backward(*args, **options)
    return backends.run("linear_cross_entropy_backward", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *args: Any, needs: Sequence[bool], **options: Any
) -> list[Tensor]:
    _check_backward(grad, x, weight, *args, needs=needs, **options)
    return _fake_gradients(x, weight, needs)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.options = dict(options)
    ctx.reduction = ctx.options.pop("reduction")
    ctx.save_for_backward(*inputs, output[1])


@backward_formula(4)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    x, weight, target, bias, logsumexp = saved
    if grad is None:
        return None, None, None, None
    if ctx.reduction == "mean":
        grad = grad / (target != ctx.options["ignore_index"]).sum().clamp(min=1)
    asked = [needs[0], needs[1], needs[3]]
    results = call(
        *("linear_cross_entropy_backward", grad.expand(target.shape), x, weight, target, bias, logsumexp),
        **ctx.options,
        needs=asked,
    )
    dx, dweight, dbias = gradients(results, asked)
    return dx, dweight, None, dbias


def _setup_context_training(
    ctx: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    x, weight, _, bias = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.made = options["needs"]
    # x, weight and bias show autograd that the gradients depend on them, for a second derivative to raise.
    ctx.save_for_backward(*output[2:], *(t for t in (x, weight, bias) if t is not None))


@backward_formula(4)
def _backward_training(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    made, inputs = saved[:3], saved[3:]
    asked = [needs[0], needs[1], needs[3]]
    for name, need, was_made in zip(_GRADIENTS, asked, ctx.made, strict=True):
        if need and not was_made:
            raise RuntimeError(f"{name} wants a gradient, which needs={list(ctx.made)} did not ask for")
    results = torch.ops.bigmodel.linear_cross_entropy_scaled.default(
        grad, [g for g, need in zip(made, asked, strict=True) if need], list(inputs)
    )
    scaled = iter(results)
    dx, dweight, dbias = (next(scaled) if need else None for need in asked)
    return dx, dweight, None, dbias


def _run_scaled(grad: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [g * grad.to(g.dtype) if g.dtype == grad.dtype else (g * grad).to(g.dtype) for g in gradients]


def _fake_scaled(grad: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(g) for g in gradients]


_TENSORS = "Tensor x, Tensor weight, Tensor target, Tensor? bias"
_SMOOTHED = "int ignore_index=-100, float label_smoothing=0.0"
_OPTIONS = f'{_SMOOTHED}, str reduction="mean"'
define(
    f"linear_cross_entropy({_TENSORS}=None, *, {_OPTIONS}) -> (Tensor, Tensor)",
    _run,
    _fake,
    autocast="lower",
    rows=(),
)
define(
    f"linear_cross_entropy_training({_TENSORS}=None, *, {_OPTIONS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_training,
    _fake_training,
    autocast="lower",
    rows=(),
)
define(
    f"linear_cross_entropy_backward(Tensor grad, {_TENSORS}, Tensor logsumexp, *, {_SMOOTHED}, "
    "bool[] needs) -> Tensor[]",
    _run_backward,
    _fake_backward,
    rows=(),
)
define(
    "linear_cross_entropy_scaled(Tensor grad, Tensor[] gradients, Tensor[] inputs) -> Tensor[]",
    _run_scaled,
    _fake_scaled,
    rows=(),
)
register_gradient("linear_cross_entropy", _backward, _setup_context)
register_gradient("linear_cross_entropy_training", _backward_training, _setup_context_training)
no_second_derivative("linear_cross_entropy_backward", "torch.nn.functional.cross_entropy")
no_second_derivative("linear_cross_entropy_scaled", "torch.nn.functional.cross_entropy")
