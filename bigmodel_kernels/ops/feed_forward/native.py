"""Feed-forward block by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.linear.native import empty, for_training, packed
from bigmodel_kernels.ops.native_library import contiguous, lacking, shaped


def supports(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    *args: Any,
    **options: Any,
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_feed_forward_training", x.dtype) or empty(w_in, w_out)


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
        None if w_gate is None else packed([w_gate], weight_layout),
        contiguous(b_gate),
        dropout_seed,
        norm_kind=norm_kind,
        dropout_p=dropout_p,
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
    weight_layout: str = "linear",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `run`, and what the activation, the gate's activation and a norm behind were given."""

    def weight(w: Tensor) -> Tensor:
        return for_training([w], weight_layout)[0]

    return torch.ops.bigmodel.cpu_feed_forward_training(  # type: ignore[no-any-return]
        x.contiguous(),
        weight(w_in),
        contiguous(b_in),
        weight(w_out),
        contiguous(b_out),
        contiguous(residual),
        contiguous(norm_weight),
        contiguous(norm_bias),
        None if w_gate is None else weight(w_gate),
        contiguous(b_gate),
        dropout_seed,
        weight_layout=weight_layout,
        **options,
    )


def supports_backward(grad: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_feed_forward_backward", grad.dtype) or empty(args[1], args[3])


def run_backward(
    grad: Tensor,
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
    preactivation: Tensor | None = None,
    gate_preactivation: Tensor | None = None,
    prenorm: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Gradients of all ten tensors of the block, in their order."""
    return torch.ops.bigmodel.cpu_feed_forward_backward(  # type: ignore[no-any-return]
        grad.contiguous(),
        shaped(x),
        w_in.contiguous(),
        contiguous(b_in),
        w_out.contiguous(),
        contiguous(b_out),
        contiguous(residual),
        contiguous(norm_weight),
        contiguous(norm_bias),
        contiguous(w_gate),
        contiguous(b_gate),
        dropout_seed,
        contiguous(preactivation),
        contiguous(gate_preactivation),
        contiguous(prenorm),
        **options,
    )
