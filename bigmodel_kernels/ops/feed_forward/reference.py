"""Feed-forward block in plain PyTorch: the definition of right."""

from __future__ import annotations

from torch import Tensor

from bigmodel_kernels.ops.activations import activate
from bigmodel_kernels.ops.linear.reference import project
from bigmodel_kernels.ops.norm.reference import normalize
from bigmodel_kernels.ops.registration import compute_dtype


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
    """See `bigmodel_kernels.feed_forward`. The normalised input ("pre") and the hidden layer are rounded to
    the dtype of x, because a matrix unit reads them in it; all else is in the type of computation."""
    compute = compute_dtype(x.dtype)
    high = x.to(compute)
    if norm_position == "pre":
        high = normalize(high, norm_weight, norm_bias, norm_eps).to(x.dtype).to(compute)
    hidden = activate(project(high, w_in, b_in, weight_layout), activation).to(x.dtype).to(compute)
    y = project(hidden, w_out, b_out, weight_layout)
    if residual is not None:
        y = y + residual
    if norm_position == "post":
        y = normalize(y, norm_weight, norm_bias, norm_eps)
    return y.to(x.dtype)
