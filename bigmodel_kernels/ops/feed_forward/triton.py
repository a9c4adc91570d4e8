"""Feed-forward block in Triton: two matrix products with fused epilogues, and the norm.

    Vaswani et al.: Attention Is All You Need, arXiv 1706.03762, section 3.3; pre-norm: Xiong et al., On Layer
    Normalization in the Transformer Architecture, arXiv 2002.04745.

::

    pre-norm    x --> layer_norm --+
                                   v
    hidden = activation(x @ W_in + b_in)       one launch, epilogue: bias, activation
    y      = hidden @ W_out + b_out + residual one launch, epilogue: bias, residual
                                   |
    post-norm                      +--> layer_norm

The hidden activation goes through memory once: fusing the two products would need the whole hidden row (4
times the model's width) of a tile on chip, and each program would read all of both weights.
"""

from __future__ import annotations

from torch import Tensor

from ..linear import triton as linear
from ..norm import triton as norm


def run(
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
) -> Tensor:
    """``FFN(x) + residual`` with the norm before ("pre"), after ("post") or nowhere ("none")."""
    if norm_position == "pre":
        x = norm.run(x, norm_weight, norm_bias, norm_eps)
    hidden = linear.run(
        x, [w_in], [] if b_in is None else [b_in], weight_layout=weight_layout, activation=activation
    )
    out = linear.run(hidden, [w_out], [] if b_out is None else [b_out], residual, weight_layout=weight_layout)
    return norm.run(out, norm_weight, norm_bias, norm_eps) if norm_position == "post" else out


def supports(
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
) -> str | None:
    """Why this call cannot run here, or None."""
    reason = linear.supports(x, [w_in, w_out], [], weight_layout=weight_layout, activation=activation)
    if reason is None and norm_position != "none":
        reason = norm.supports(x, norm_weight, norm_bias, norm_eps)
    return reason
