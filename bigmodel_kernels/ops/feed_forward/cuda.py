"""Feed-forward block on the CUDA library's linear layer: two launches, or torch's products where faster.

The first has bias and activation in it, the second bias, dropout and residual; a norm before or behind is a
launch of its own. Which product runs each, cuda_choice.py decides. Blocks with a gate have no kernel here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigmodel_kernels.ops.cuda_library import unmeasured
from bigmodel_kernels.ops.linear import cuda as linear


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
    *args: Any,
    weight_layout: str = "linear",
    **options: Any,
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if w_gate is not None:
        return "a gate needs two products in one launch"
    if reason := linear.supports(x, [w_in], [], weight_layout=weight_layout):
        return reason
    size = w_out.shape[1 if weight_layout == "conv1d" else 0]
    return f"w_out gives {size} features, not a multiple of 8" if size % 8 else None


supports_training = supports
only_when_forced = only_when_forced_training = unmeasured


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
    """The result, what the activation, a gate (there is none) and a norm after the block were given.

    Empty (0,) where there is none, and the first if `recompute`.
    """
    normalised = x
    if norm_position == "pre" and norm_weight is not None:
        normalised, _ = linear.normalise(x, norm_weight, norm_bias, norm_eps, norm_kind)
    layer = linear.run if recompute else linear.run_training
    first = layer(
        normalised, [w_in], [] if b_in is None else [b_in], weight_layout=weight_layout, activation=activation
    )
    hidden, preactivation = (first, x.new_empty(0)) if recompute else first[:2]
    if activation == "none" and not recompute:
        preactivation = hidden
    post = norm_position == "post"
    out, _, prenorm = linear.run_training(
        hidden,
        [w_out],
        [] if b_out is None else [b_out],
        residual,
        norm_weight if post else None,
        norm_bias if post else None,
        dropout_seed,
        weight_layout=weight_layout,
        norm_eps=norm_eps,
        norm_kind=norm_kind,
        dropout_p=dropout_p,
    )
    return out, preactivation, x.new_empty(0), prenorm


def run(*args: Any, **options: Any) -> Tensor:
    """See `bigmodel_kernels.feed_forward`."""
    return run_training(*args, **options, recompute=True)[0]


def detail(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    *args: Any,
    activation: str,
    weight_layout: str = "linear",
    **options: Any,
) -> str:
    """Which product runs the first half, for `explain`."""
    biases = [] if b_in is None else [b_in]
    first = linear.detail(x, [w_in], biases, activation=activation, weight_layout=weight_layout)
    return f"the first product by {first}"


detail_training = detail
