"""Linear by the compiled CUDA library: Hopper's kernel there, elsewhere the one for sm_80 and later.

One launch for all weights, with bias, activation, dropout and residual in it, and one for a norm. Where
torch's product has been measured to be faster for one weight (cuda_choice.py), that runs, and the residual
goes with the norm. There is no gradient here; it takes the order of the table in `backends`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.activations import activate
from bigmodel_kernels.ops.cuda_library import lacking, readable, unmeasured
from bigmodel_kernels.ops.linear.cuda_choice import OWN, Case, Choice, choose

WEIGHTS = 4  # side by side in one product


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
    if len(weights) > WEIGHTS:
        return f"{len(weights)} weights; its product takes up to {WEIGHTS} side by side"
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
only_when_forced = only_when_forced_training = unmeasured


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
    return choose(*_device(x.device), case_of(x, weights, *rest, **options))


@functools.cache
def _device(device: torch.device) -> tuple[str, str]:
    """Name and compute capability."""
    return torch.cuda.get_device_name(device), "{}.{}".format(*torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=1024)
def remembered(device: torch.device, case: Case) -> str:
    """The product of a case, looked up once."""
    return choose(*_device(device), case).product


def detail(*args: Any, **options: Any) -> str:
    """Which product runs the call, for `explain`."""
    return str(_choice(*args, **options))


detail_training = detail


def _own(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    *,
    keep_preactivation: bool,
    weight_layout: str,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """By the library, of rows: up to the norm, and what the activation was given, or nothing."""
    return torch.ops.bigmodel.cuda_linear.default(  # type: ignore[no-any-return]
        aligned(x),
        [aligned(w.contiguous()) for w in weights],
        [aligned(b) for b in biases],
        residual,
        dropout_seed,
        weight_layout=weight_layout,
        activation=activation,
        dropout_p=dropout_p,
        keep_preactivation=keep_preactivation,
    )


def _torch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    keep_preactivation: bool,
    weight_layout: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The same by torch, of one weight, without dropout and before the residual."""
    weight = weights[0].t() if weight_layout == "conv1d" else weights[0]
    preactivation = F.linear(x, weight, biases[0] if biases else None)
    return activate(preactivation, activation), preactivation if keep_preactivation else x.new_empty(0)


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    *,
    residual: Tensor | None = None,
    keep_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm of this kind of `x + residual`, and that sum (empty unless `keep_sum`); 8 n columns."""
    rows = rows_of(x)
    out, total = torch.ops.bigmodel.cuda_norm.default(
        rows,
        None if residual is None else rows_of(residual),
        aligned(weight),
        None if bias is None else aligned(bias),
        eps=eps,
        kind=kind,
        keep_sum=keep_sum,
    )
    return out.view(x.shape), total.view(x.shape) if keep_sum else total


def rows_of(x: Tensor) -> Tensor:
    """(rows, columns), contiguous and aligned."""
    return aligned(x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous())


def aligned(matrix: Tensor) -> Tensor:
    """The matrix, or a copy that the library can read: rows in pieces of 16 bytes."""
    ready = matrix.shape[-1] <= 1 or matrix.stride(-1) == 1
    return matrix if ready and readable(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    training: bool,
    product: str | None,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and in `training` what activation and norm were given; empty where there is none."""
    options: dict[str, Any] = {"weight_layout": weight_layout, "activation": activation}
    if product is None:
        given = (residual, norm_weight, norm_bias, dropout_seed)
        product = _choice(
            x, weights, biases, *given, **options, norm_kind=norm_kind, dropout_p=dropout_p
        ).product
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    more = None if residual is None else rows_of(residual)
    keep = training and activation != "none"
    if product == OWN:
        out, kept = _own(
            *(rows, weights, biases, more, dropout_seed),
            **options,
            dropout_p=dropout_p,
            keep_preactivation=keep,
        )
        more = None
    else:
        out, kept = _torch(rows, weights, biases, **options, keep_preactivation=keep)
        if more is not None and norm_weight is None:
            out, more = out + more if out is kept else out.add_(more), None
    before = out
    if norm_weight is not None:
        keep_sum = training and more is not None
        norm = (norm_weight, norm_bias, norm_eps, norm_kind)
        out, total = normalise(out, *norm, residual=more, keep_sum=keep_sum)
        before = total if keep_sum else before
    size, empty = (*x.shape[:-1], out.shape[1]), x.new_empty(0)
    return (
        out.view(size),
        kept.view(size) if keep else empty,
        before.view(size) if training and norm_weight is not None else empty,
    )


def run(*args: Any, product: str | None = None, **options: Any) -> Tensor:
    """See `bigmodel_kernels.linear`. `product`: this one, whatever has been measured."""
    return _run(*args, training=False, product=product, **options)[0]


def run_training(*args: Any, product: str | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `run`, and what the activation and the norm were given, empty where there is none."""
    return _run(*args, training=True, product=product, **options)
