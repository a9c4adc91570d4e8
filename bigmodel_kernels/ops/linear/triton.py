"""Linear layer in Triton: ``norm(dropout(activation(x @ W + b)) + residual)``, forward and backward.

Forward, one launch of ``triton_gemm.linear_kernel`` for each weight (Q, K and V write their own slices of the
output), and one of the norm, which needs whole rows. A training step also keeps what the activation and the
norm were given.

Backward, with dT the gradient before the norm::

    grad --> norm's backward --> dT = dresidual --> dZ = dT kept * activation'(Z)     element by element
                                                     |
                   +--------------------+------------+-----------+
                   v                    v                        v
        dX = dZ @ W^T          dW = X^T @ dZ              db = column sums of dZ
        several weights: one   tokens are split over      two stages
        float32 sum            programs, added in order

Behind a norm and with no activation, dropout and db are the norm's kernel's: it has dT in registers. Where
products are the vendor's library's, those of several weights side by side are one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...triton_runtime import INTERPRETED, is_pretending, unsupported
from ..norm import triton as norm
from ..reduce_triton import column_sums, column_sums_of
from .triton_gemm import ACTIVATIONS, matmul, output_backward

LAYER_NORM = "layer_norm"


def normalise_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """The norm of this kind."""
    return norm.run(x, weight, bias, eps) if kind == LAYER_NORM else norm.run_rms_norm(x, weight, eps)


def as_product(weight: Tensor, weight_layout: str) -> Tensor:
    """The weight as the (in, out) matrix that x is multiplied by; a view."""
    return weight if weight_layout == "conv1d" else weight.t()


def _by_library(x: Tensor) -> bool:
    """Whether products with nothing to fuse are the vendor's library's (cuBLAS), which has them faster.

    Not in float32, which it may round to TF32, nor where bits must not vary: it splits its sums.
    """
    return (
        x.is_cuda
        and x.dtype != torch.float32
        and not (INTERPRETED or is_pretending() or torch.are_deterministic_algorithms_enabled())
    )


def _joined(weights: Sequence[Tensor], weight_layout: str) -> Tensor:
    """The weights of products side by side as one."""
    return torch.cat(list(weights), 1 if weight_layout == "conv1d" else 0)


def weight_gradient(x: Tensor, dz: Tensor, weight: Tensor, weight_layout: str) -> Tensor:
    """x^T @ dz in the weight's layout: x (M, K), dz (M, N)."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if x.shape[0] == 0:
        return out.zero_()
    if _by_library(x):
        return torch.mm(*((x.t(), dz) if weight_layout == "conv1d" else (dz.t(), x)), out=out)
    return (
        matmul(x.t(), dz, out, split=True)
        if weight_layout == "conv1d"
        else matmul(dz.t(), x, out, split=True)
    )


def input_gradient(parts: Sequence[Tensor], weights: Sequence[Tensor], weight_layout: str) -> Tensor:
    """The sum of ``part @ weight^T``, by Triton in float32 and rounded once."""
    if _by_library(parts[0]):
        total = torch.mm(parts[0], as_product(weights[0], weight_layout).t())
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total = total.addmm_(part, as_product(weight, weight_layout).t())
        return total
    like, K = parts[0], as_product(weights[0], weight_layout).shape[0]
    out = torch.empty(like.shape[0], K, dtype=like.dtype, device=like.device)
    halves = like.dtype != torch.float32
    total = torch.empty_like(out, dtype=torch.float32) if halves and len(parts) > 1 else out
    for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        last = i == len(parts) - 1
        matmul(
            part, as_product(weight, weight_layout).t(), out if last else total, residual=total if i else None
        )
    return out


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    weight_layout: str,
    activation: str,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """``dropout(activation(x @ W + b)) + residual`` and, if wanted, what the activation was given."""
    products = [as_product(weight, weight_layout) for weight in weights]
    size = sum(product.shape[1] for product in products)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    saved = torch.empty_like(out) if save else None
    if out.numel() == 0:
        return out, saved
    rows = out.numel() // size
    x_rows, out_rows = x.reshape(rows, x.shape[-1]), out.view(rows, size)
    saved_rows = None if saved is None else saved.view(rows, size)
    residual_rows = None if residual is None else norm.as_rows(residual)
    start = 0
    for i, product in enumerate(products):
        columns = slice(start, start + product.shape[1])
        matmul(
            x_rows,
            product,
            out_rows[:, columns],
            bias=biases[i].contiguous() if biases else None,
            activation=activation,
            residual=None if residual_rows is None else residual_rows[:, columns],
            saved=None if saved_rows is None else saved_rows[:, columns],
            dropout_seed=dropout_seed,
            dropout=norm.dropout_arguments(dropout_p),
            first_column=start,
        )
        start = columns.stop
    return out, saved


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = LAYER_NORM,
    dropout_p: float = 0.0,
) -> Tensor:
    """``norm(dropout(activation(x @ W + b)) + residual)``, W and b side by side: (..., in) to (..., out)."""
    out, _ = _forward(
        x, weights, biases, residual, dropout_seed, weight_layout, activation, dropout_p, save=False
    )
    return out if norm_weight is None else normalise_rows(out, norm_weight, norm_bias, norm_eps, norm_kind)


def run_training(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = LAYER_NORM,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, what the activation was given and what the norm was given; (0,) where there is none."""
    out, saved = _forward(
        x, weights, biases, residual, dropout_seed, weight_layout, activation, dropout_p, activation != "none"
    )
    saved = x.new_empty(0) if saved is None else saved
    if norm_weight is None:
        return out, saved, x.new_empty(0)
    return normalise_rows(out, norm_weight, norm_bias, norm_eps, norm_kind), saved, out


def run_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
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
    norm_kind: str = LAYER_NORM,
    dropout_p: float = 0.0,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of [x, residual, norm_weight, norm_bias, *weights, *biases]; empty (0,) where not needed.

    A missing ``preactivation`` or ``prenorm`` is computed again.
    """
    need_x, need_residual, need_norm_weight, need_norm_bias = needs[:4]
    need_weights, need_biases = needs[4 : 4 + len(weights)], needs[4 + len(weights) :]
    results = [x.new_empty(0) for _ in needs]
    need_products = need_x or any(need_weights) or any(need_biases)
    if norm_weight is not None:
        if prenorm is None:
            prenorm, preactivation = _forward(
                x, weights, biases, residual, dropout_seed, weight_layout, activation, dropout_p,
                save=activation != "none",
            )  # fmt: skip
        # Where the norm's kernel has the gradient of the product itself, dropout and sums of columns are its.
        behind = activation == "none" and need_products and grad.shape[-1] <= norm.MAX_COLUMNS_SUMMED
        only = behind and len(biases) == 1 and need_biases[0]
        grad, dresidual, results[2], results[3], *sums = norm.run_backward(
            grad, prenorm, norm_weight, norm_bias, None, dropout_seed if behind else None,
            kind=norm_kind, eps=norm_eps, dropout_p=dropout_p, summed=True,
            needs=[
                need_products or need_residual, behind and dropout_seed is not None and need_residual,
                need_norm_weight, need_norm_bias, *[True] * only,
            ],
        )  # fmt: skip
        if need_residual:
            results[1] = dresidual if dresidual.numel() else grad
        if behind:
            dropout_seed = None
        if sums:
            results[-1], need_biases = sums[0], [False]
    elif need_residual:  # a copy: what an operator returns must not be what it was given
        results[1] = grad.clone(memory_format=torch.contiguous_format)
    if not need_products:
        return results
    dz = norm.as_rows(grad)
    x_rows = x.reshape(dz.shape[0], x.shape[-1])
    if activation != "none" and preactivation is None:
        _, preactivation = _forward(x, weights, biases, None, None, weight_layout, activation, 0.0, save=True)
    if activation != "none" or dropout_seed is not None:
        saved = None if preactivation is None or activation == "none" else norm.as_rows(preactivation)
        dz = output_backward(dz, saved, activation, dropout_seed, norm.dropout_arguments(dropout_p))
    sizes = [as_product(weight, weight_layout).shape[1] for weight in weights]
    parts = dz.split(sizes, 1)
    whole = len(weights) > 1 and _by_library(dz)
    if need_x and whole:  # one product, rounded once
        results[0] = input_gradient([dz], [_joined(weights, weight_layout)], weight_layout).view(x.shape)
    elif need_x:
        results[0] = input_gradient(parts, weights, weight_layout).view(x.shape)
    if whole and all(need_weights) and weight_layout == "linear":  # rows of one matrix, which they stay
        results[4 : 4 + len(weights)] = torch.mm(dz.t(), x_rows).split(sizes)
    else:
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            if need_weights[i]:
                results[4 + i] = weight_gradient(x_rows, part, weight, weight_layout)
    if biases and all(need_biases):
        results[4 + len(weights) :] = [torch.empty_like(bias) for bias in biases]
        column_sums_of(dz, results[4 + len(weights) :])
    elif biases:
        for i, part in enumerate(parts):
            if need_biases[i]:
                results[4 + len(weights) + i] = column_sums(part, torch.empty_like(biases[i]))
    return results


def supports(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    **options: object,
) -> str | None:
    """Why this call cannot run here, or None."""
    return _supports(x, weights, norm_weight, dropout_seed, weight_layout, activation, norm.MAX_COLUMNS)


supports_training = supports


def supports_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *saved: Tensor | None,
    weight_layout: str = "linear",
    activation: str = "none",
    **options: object,
) -> str | None:
    """Why this call cannot run here, or None."""
    limit = norm.MAX_COLUMNS_BACKWARD
    return _supports(x, weights, norm_weight, dropout_seed, weight_layout, activation, limit)


def _supports(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    dropout_seed: Tensor | None,
    weight_layout: str,
    activation: str,
    max_columns: int,
) -> str | None:
    if reason := unsupported("x", x):
        return reason
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    for weight in weights:
        if weight.dtype != x.dtype:
            return f"a weight is {weight.dtype} and x is {x.dtype}; the product needs one dtype"
    sizes = [as_product(weight, weight_layout).shape[1] for weight in weights]
    if norm_weight is not None and sum(sizes) > max_columns:
        return f"the norm is over {sum(sizes)} features; the Triton kernel takes up to {max_columns}"
    if dropout_seed is not None and any(size % 32 for size in sizes[:-1]):
        return f"dropout over weights of {sizes} features; all but the last must be multiples of 32"
    return None
