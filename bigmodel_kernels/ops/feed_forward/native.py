"""Feed-forward block by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.activations import activate
from bigmodel_kernels.ops.linear import native as linear
from bigmodel_kernels.ops.linear.native import packed
from bigmodel_kernels.ops.native_library import contiguous, unavailable
from bigmodel_kernels.ops.norm import native as norm


def supports(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
    **options: Any,
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if norm_kind != "layer_norm":
        return f"it has no {norm_kind} here"
    if w_gate is not None:
        return "it has no gate here"
    return unavailable(x.dtype) or ("it has no dropout here" if dropout_p else None)


def run(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    activation: str,
    weight_layout: str = "linear",
    norm_position: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> Tensor:
    """See `bigmodel_kernels.feed_forward`."""
    return torch.ops.bigmodel.cpu_feed_forward(  # type: ignore[no-any-return]
        x.contiguous(),
        packed([w_in], weight_layout),
        contiguous(b_in),
        packed([w_out], weight_layout),
        contiguous(b_out),
        activation,
        contiguous(residual),
        norm_position,
        contiguous(norm_weight),
        contiguous(norm_bias),
        norm_eps,
    )


supports_training = supports


def run_training(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    activation: str,
    weight_layout: str = "linear",
    norm_position: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two products, and activation and norm in passes of their own: their inputs are kept."""
    rows = norm.run(x, norm_weight, norm_bias, norm_eps) if norm_position == "pre" else x
    z = linear.run(rows, [w_in], [] if b_in is None else [b_in], weight_layout=weight_layout)
    hidden = activate(z, activation)
    biases = [] if b_out is None else [b_out]
    out = linear.run(hidden, [w_out], biases, residual, weight_layout=weight_layout)
    prenorm = x.new_empty(0)
    if norm_position == "post":
        prenorm = out
        out = norm.run(prenorm, norm_weight, norm_bias, norm_eps)
    return out, x.new_empty(0) if recompute else z, x.new_empty(0), prenorm
