"""Linear and cross-entropy in one by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import contiguous, lacking


def supports(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if not weight.numel():
        return "it has no products with an empty weight"
    return lacking("cpu_linear_cross_entropy", x.dtype)


def run(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.linear_cross_entropy`."""
    return torch.ops.bigmodel.cpu_linear_cross_entropy(  # type: ignore[no-any-return]
        *map(contiguous, (x, weight, target, bias)), **options
    )


supports_training = supports


def run_training(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """As `run`, with the gradients for a gradient of 1 of the loss."""
    return torch.ops.bigmodel.cpu_linear_cross_entropy_training(  # type: ignore[no-any-return]
        *map(contiguous, (x, weight, target, bias)), **options
    )


def supports_backward(grad: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return supports(*args, **options)


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    **options: Any,
) -> list[Tensor]:
    """Gradients of x, weight and bias for a gradient (N,) of the losses of the rows; the library makes the
    softmax anew, not from `logsumexp`, whose rounding a large one would carry into every probability.
    """
    return torch.ops.bigmodel.cpu_linear_cross_entropy_backward(  # type: ignore[no-any-return]
        *map(contiguous, (grad, x, weight, target, bias)), **options
    )
