"""Linear by the compiled CUDA library: Hopper's kernel there, elsewhere the one for sm_80 and later.

One launch for all weights: product, bias, activation, dropout, residual and norm. Where torch's product has
been measured to be faster for one weight (cuda_choice.py), that runs, and the rest after it. There is no
gradient here; it takes the order of the table in `backends`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.activations import activate
from bigmodel_kernels.ops.cuda_library import counters, lacking, readable, unmeasured
from bigmodel_kernels.ops.linear.cuda_choice import OWN, TORCH, Case, Choice, choose

_WEIGHTS = 4  # side by side in one product
_PANEL = 64  # rows that a kernel normalises together, at least


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


def only_when_forced(x: Tensor, *args: Any, **options: Any) -> str | None:
    """Why the library does not run the call unasked, or None."""
    return unmeasured(x)


only_when_forced_training = only_when_forced


def case_of(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *rest: Any,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_kind: str = "layer_norm",
    **options: Any,
) -> Case:
    """What the time of a call depends on."""
    finish = [activation, *["residual"] * (residual is not None), *[norm_kind] * (norm_weight is not None)]
    features, rows = x.shape[-1], x.shape[:-1].numel()
    out = sum(w.shape[1 if weight_layout == "conv1d" else 0] for w in weights)
    return Case(str(x.dtype)[6:], features, out, weight_layout, " + ".join(finish), rows)


def _choice(
    x: Tensor, weights: Sequence[Tensor], *rest: Any, dropout_p: float = 0.0, **options: Any
) -> Choice:
    if len(weights) > 1:
        return Choice(OWN, "which takes several weights side by side")
    if dropout_p:
        return Choice(OWN, "which drops where the gradient will")
    return choose(_name(x.device), case_of(x, weights, *rest, **options))


_name = functools.cache(torch.cuda.get_device_name)


def detail(*args: Any, **options: Any) -> str:
    """Which product runs the call, for `explain`."""
    return str(_choice(*args, **options))


detail_training = detail


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    keep_preactivation: bool,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the library: up to the norm, what the activation was given, and the norm; empty where not wanted."""
    rows = x.reshape(-1, x.shape[-1])
    out, preactivation, normalised = torch.ops.bigmodel.cuda_linear.default(
        _aligned(rows),
        [_aligned(w.contiguous()) for w in weights],
        [_aligned(b) for b in biases],
        None
        if residual is None
        else _aligned(residual.reshape(rows.shape[0], residual.shape[-1]).contiguous()),
        None if norm_weight is None else _aligned(norm_weight),
        None if norm_bias is None else _aligned(norm_bias),
        dropout_seed,
        None if norm_weight is None else counters(x.device, -(-rows.shape[0] // _PANEL) or 1),
        weight_layout=weight_layout,
        activation=activation,
        norm_eps=norm_eps,
        norm_kind=norm_kind,
        dropout_p=dropout_p,
        keep_preactivation=keep_preactivation,
    )
    size, empty = (*x.shape[:-1], out.shape[1]), x.new_empty(0)
    return (
        out.view(size),
        preactivation.view(size) if keep_preactivation else empty,
        empty if norm_weight is None else normalised.view(size),
    )


def _run_torch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    keep_preactivation: bool,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch, of one weight and without dropout."""
    empty = x.new_empty(0)
    weight = weights[0].t() if weight_layout == "conv1d" else weights[0]
    preactivation = F.linear(x, weight, biases[0] if biases else None)
    out = activate(preactivation, activation)
    out = out if residual is None else out + residual
    normalised = empty if norm_weight is None else normalise(out, norm_weight, norm_bias, norm_eps, norm_kind)
    return out, preactivation if keep_preactivation else empty, normalised


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """The norm of this kind, by torch."""
    if kind == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _aligned(matrix: Tensor) -> Tensor:
    ready = readable(matrix) and (matrix.shape[-1] <= 1 or matrix.stride(-1) == 1)
    return matrix if ready else matrix.clone(memory_format=torch.contiguous_format)


def _function(product: str | None, *args: Any, **options: Any) -> Any:
    chosen = product or _choice(*args, **options).product
    return _run_torch if chosen == TORCH else _run


def run(*args: Any, product: str | None = None, **options: Any) -> Tensor:
    """See `bigmodel_kernels.linear`. `product`: this one, whatever has been measured."""
    function = _function(product, *args, **options)
    out, _, normalised = function(*args, keep_preactivation=False, **options)
    return normalised if len(args) > 4 and args[4] is not None else out  # type: ignore[no-any-return]


def run_training(*args: Any, product: str | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `run`, and what the activation and the norm were given, empty where there is none."""
    keep = options.get("activation", "none") != "none"
    function = _function(product, *args, **options)
    out, preactivation, normalised = function(*args, keep_preactivation=keep, **options)
    if len(args) > 4 and args[4] is not None:
        return normalised, preactivation, out
    return out, preactivation, normalised
