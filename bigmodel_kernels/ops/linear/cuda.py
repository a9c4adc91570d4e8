"""Linear by the compiled CUDA library: Hopper's kernel there, elsewhere the one for sm_80 and later.

One launch for all weights: product, bias, activation, dropout and residual. The norm, which needs whole rows,
is PyTorch's. There is no gradient here; it takes the order of the table in `backends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.cuda_library import lacking, readable

_WEIGHTS = 4  # side by side in one product


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
    **options: Any,
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    if reason := lacking(x):
        return reason
    if len(weights) > _WEIGHTS:
        return f"{len(weights)} weights; its product takes up to {_WEIGHTS} side by side"
    if dropout_seed is not None and len(weights) > 1:
        return f"dropout over {len(weights)} weights; its kernel drops in the result of one"
    if x.shape[-1] == 0 or x.shape[-1] % 8:
        return f"x has {x.shape[-1]} features, not a multiple of 8"
    for weight in weights:
        size = weight.shape[1 if weight_layout == "conv1d" else 0]
        if size % 8:
            return f"a weight gives {size} features, not a multiple of 8"
    return None


supports_training = supports


def _product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    weight_layout: str,
    activation: str,
    dropout_p: float,
    keep_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """All but the norm, and what the activation was given where that is wanted."""
    rows = x.reshape(-1, x.shape[-1])
    out, preactivation = torch.ops.bigmodel.cuda_linear.default(
        _aligned(rows),
        [_aligned(w.contiguous()) for w in weights],
        [b.contiguous() for b in biases],
        None
        if residual is None
        else _aligned(residual.reshape(rows.shape[0], residual.shape[-1]).contiguous()),
        dropout_seed,
        weight_layout=weight_layout,
        activation=activation,
        dropout_p=dropout_p,
        keep_preactivation=keep_preactivation,
    )
    size = (*x.shape[:-1], out.shape[1])
    return out.view(size), preactivation.view(size) if keep_preactivation else x.new_empty(0)


def _aligned(matrix: Tensor) -> Tensor:
    ready = readable(matrix) and (matrix.shape[-1] <= 1 or matrix.stride(-1) == 1)
    return matrix if ready else matrix.clone(memory_format=torch.contiguous_format)


def _normalised(out: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    if weight is None:
        return out
    if kind == "rms_norm":
        return F.rms_norm(out, out.shape[-1:], weight, eps)
    return F.layer_norm(out, out.shape[-1:], weight, bias, eps)


def run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> Tensor:
    """See `bigmodel_kernels.linear`."""
    out, _ = _product(x, weights, biases, residual, dropout_seed, weight_layout, activation, dropout_p, False)
    return _normalised(out, norm_weight, norm_bias, norm_eps, norm_kind)


def run_training(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `run`, and what the activation and the norm were given, empty where there is none."""
    keep = activation != "none"
    out, preactivation = _product(
        x, weights, biases, residual, dropout_seed, weight_layout, activation, dropout_p, keep
    )
    if norm_weight is None:
        return out, preactivation, x.new_empty(0)
    return _normalised(out, norm_weight, norm_bias, norm_eps, norm_kind), preactivation, out
