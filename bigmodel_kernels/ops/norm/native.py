"""LayerNorm and RMSNorm by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import contiguous, lacking


def supports(x: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_rms_norm", x.dtype)


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
    return torch.ops.bigmodel.cpu_layer_norm(  # type: ignore[no-any-return]
        *map(contiguous, (x, weight, bias)),
        eps,
        contiguous(residual),
        dropout_seed if dropout_p else None,
        dropout_p=dropout_p,
    )


supports_rms_norm = supports


def run_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """See `bigmodel_kernels.rms_norm`."""
    return torch.ops.bigmodel.cpu_rms_norm(  # type: ignore[no-any-return]
        x.contiguous(), contiguous(weight), eps, contiguous(residual), dropout_seed, **options
    )


def supports_backward(grad: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_norm_backward", grad.dtype)


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Gradients of x, residual, weight and bias."""
    return torch.ops.bigmodel.cpu_norm_backward(  # type: ignore[no-any-return]
        *map(contiguous, (grad, x, weight, bias, residual)), dropout_seed, **options
    )
