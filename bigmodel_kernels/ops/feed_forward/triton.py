"""Feed-forward block in Triton: two matrix products (three with a gate) with fused epilogues, and the norm.

    Vaswani et al.: Attention Is All You Need, arXiv 1706.03762, section 3.3; pre-norm: Xiong et al., On Layer
    Normalization in the Transformer Architecture, arXiv 2002.04745; gates: Shazeer, GLU Variants Improve
    Transformer, arXiv 2002.05202.

::

    pre-norm    x --> norm --------+
                                   v
    hidden = activation(x @ W_in + b_in)            one launch, epilogue: bias, activation
             or activation(x @ W_gate + b_gate) * (x @ W_in + b_in), one launch with two accumulators
    y      = dropout(hidden @ W_out + b_out) + residual         one launch, epilogue: bias, dropout, residual
                                   |
    post-norm                      +--> norm

The hidden layer goes through memory once: fusing the two products would need the whole hidden row (4 times
the model's width) of a tile on chip, and each program would read all of both weights.

Backward, with dY the gradient of the second product (after the norm's and dropout's own)::

    dH = dY @ W_out^T    epilogue: dZ = dH * activation'(Z), the hidden layer again, column sums of dZ (db_in)
    dW_out = hidden^T @ dY      dW_in = x^T @ dZ      dX = dZ @ W_in^T      db_out: column sums of dY

Dropout of dY and its column sums are the kernel's that has dY: the norm's behind a norm.

What a training step keeps is Z (with a gate also G); where it keeps nothing, the first product runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear import triton as linear
from ..linear import triton_gemm
from ..linear.triton import LAYER_NORM, as_product, normalise_rows
from ..linear.triton_gemm import matmul, output_backward
from ..norm import triton as norm
from ..reduce_triton import column_sums


def _hidden(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    weight_layout: str,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The hidden layer (M, F) and, if wanted, what its activation and its gate were given."""
    product = as_product(w_in, weight_layout)
    hidden = torch.empty(x.shape[0], product.shape[1], dtype=x.dtype, device=x.device)
    saved = torch.empty_like(hidden) if save else None
    gate_saved = torch.empty_like(hidden) if save and w_gate is not None else None
    matmul(
        x,
        product,
        hidden,
        bias=None if b_in is None else b_in.contiguous(),
        gate=None if w_gate is None else as_product(w_gate, weight_layout),
        gate_bias=None if b_gate is None else b_gate.contiguous(),
        activation=activation,
        saved=saved,
        gate_saved=gate_saved,
    )
    return hidden, saved, gate_saved


def _output(
    hidden: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    weight_layout: str,
    dropout_p: float,
) -> Tensor:
    product = as_product(w_out, weight_layout)
    return matmul(
        hidden,
        product,
        torch.empty(hidden.shape[0], product.shape[1], dtype=hidden.dtype, device=hidden.device),
        bias=None if b_out is None else b_out.contiguous(),
        residual=None if residual is None or residual.numel() == 0 else norm.as_rows(residual),
        dropout_seed=dropout_seed,
        dropout=norm.dropout_arguments(dropout_p),
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


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
    norm_kind: str = LAYER_NORM,
    dropout_p: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, what the activation, the gate and a norm after the block were given.

    Empty (0,) where there is none, and the first two if ``recompute``.
    """
    rows = _rows(x)
    if norm_position == "pre":
        rows = normalise_rows(rows, norm_weight, norm_bias, norm_eps, norm_kind)
    hidden, saved, gate_saved = _hidden(
        rows, w_in, b_in, w_gate, b_gate, weight_layout, activation, save=not recompute
    )
    out = _output(hidden, w_out, b_out, residual, dropout_seed, weight_layout, dropout_p)
    shape = (*x.shape[:-1], out.shape[1])
    prenorm = None
    if norm_position == "post":
        prenorm, out = out, normalise_rows(out, norm_weight, norm_bias, norm_eps, norm_kind)
    kept = [
        x.new_empty(0) if t is None else t.view(*x.shape[:-1], t.shape[1])
        for t in (saved, gate_saved, prenorm)
    ]
    return out.view(shape), kept[0], kept[1], kept[2]


def run(*arguments: Tensor | None, **options: object) -> Tensor:
    """``dropout(FFN(x)) + residual`` with the norm before ("pre"), after ("post") or nowhere ("none").

    Arguments as of :func:`run_training`, but ``recompute``.
    """
    return run_training(*arguments, **options, recompute=True)[0]  # type: ignore[arg-type]


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
    *,
    activation: str,
    weight_layout: str = "linear",
    norm_position: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = LAYER_NORM,
    dropout_p: float = 0.0,
    needs: Sequence[bool],
    hidden_backward: Callable[..., Any] = triton_gemm.hidden_backward,
) -> list[Tensor]:
    """Gradients of [x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias, w_gate, b_gate].

    Empty (0,) where not needed. What is None of the saved tensors is computed again. ``hidden_backward``:
    what runs the first product, with the arguments and results of ``triton_gemm.hidden_backward``.
    """
    (
        need_x, need_w_in, need_b_in, need_w_out, need_b_out, need_residual, need_norm_weight, need_norm_bias,
        need_w_gate, need_b_gate,
    ) = needs  # fmt: skip
    results = [x.new_empty(0) for _ in needs]
    need_norm = need_norm_weight or need_norm_bias
    need_input = need_x or (norm_position == "pre" and need_norm)
    need_hidden = need_input or need_w_in or need_b_in or need_w_gate or need_b_gate
    need_output = need_hidden or need_w_out or need_b_out
    x_rows = rows = _rows(x)
    if norm_position == "pre" and (need_hidden or need_w_out):
        rows = normalise_rows(x_rows, norm_weight, norm_bias, norm_eps, norm_kind)
    again: Tensor | None = None
    lost_norm = norm_position == "post" and prenorm is None
    lost = preactivation is None or (w_gate is not None and gate_preactivation is None)
    if lost_norm or (lost and (need_hidden or need_w_out)):
        again, preactivation, gate_preactivation = _hidden(
            rows, w_in, b_in, w_gate, b_gate, weight_layout, activation, save=True
        )
    behind = norm_position == "post" and need_output and grad.shape[-1] <= norm.MAX_COLUMNS_SUMMED
    if norm_position == "post":
        if prenorm is None and again is not None:
            prenorm = _output(again, w_out, b_out, residual, dropout_seed, weight_layout, dropout_p)
        assert prenorm is not None
        # Dropout and sums of columns are the norm's kernel's, which has the gradient in registers.
        grad, dresidual, results[6], results[7], *sums = norm.run_backward(
            grad, prenorm.view(grad.shape), norm_weight, norm_bias, None,
            dropout_seed if behind else None,
            kind=norm_kind, eps=norm_eps, dropout_p=dropout_p, summed=True,
            needs=[
                need_residual or need_output, need_residual and behind and dropout_seed is not None,
                need_norm_weight, need_norm_bias, *[True] * (behind and need_b_out),
            ],
        )  # fmt: skip
        if need_residual:
            results[5] = dresidual if dresidual.numel() else grad
        if sums:
            results[4] = sums[0]
    elif need_residual:  # a copy: what an operator returns must not be what it was given
        results[5] = grad.clone(memory_format=torch.contiguous_format)
    if not need_output:
        return results
    dy = norm.as_rows(_rows(grad))
    if not behind:
        if dropout_seed is not None:
            dy = output_backward(dy, None, "none", dropout_seed, norm.dropout_arguments(dropout_p))
        if need_b_out:
            results[4] = column_sums(dy, dy.new_empty(dy.shape[1]))
    if not (need_hidden or need_w_out):
        return results

    assert preactivation is not None
    saved = [None if t is None else _rows(t).contiguous() for t in (preactivation, gate_preactivation)]
    assert saved[0] is not None
    dup, dgate, hidden, dup_sums, dgate_sums = hidden_backward(
        dy,
        as_product(w_out, weight_layout).t(),
        saved[0],
        saved[1] if w_gate is not None else None,
        activation,
        need_hidden=need_w_out,
        need_sums=need_b_in or need_b_gate,
    )
    if need_w_out and hidden is not None:
        results[3] = linear.weight_gradient(hidden, dy, w_out, weight_layout)
    if need_w_in:
        results[1] = linear.weight_gradient(rows, dup, w_in, weight_layout)
    if need_w_gate and w_gate is not None and dgate is not None:
        results[8] = linear.weight_gradient(rows, dgate, w_gate, weight_layout)
    for place, needed, sums in ((2, need_b_in, dup_sums), (9, need_b_gate, dgate_sums)):
        if needed and sums is not None:
            results[place] = sums
    if need_input:
        gated = w_gate is not None and dgate is not None
        dx = linear.input_gradient(
            [dup, dgate] if gated else [dup],  # type: ignore[list-item]
            [w_in, w_gate] if gated else [w_in],  # type: ignore[list-item]
            weight_layout,
        )
        if norm_position == "pre":
            dx, _, results[6], results[7] = norm.run_backward(
                dx, x_rows, norm_weight, norm_bias, kind=norm_kind, eps=norm_eps,
                needs=[need_x, False, need_norm_weight, need_norm_bias],
            )  # fmt: skip
        if need_x:
            results[0] = dx.view(x.shape)
    return results


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
    *rest: Tensor | None,
    activation: str,
    norm_position: str = "none",
    **options: object,
) -> str | None:
    """Why this call cannot run here, or None."""
    weights = [w_in, w_out] if w_gate is None else [w_in, w_out, w_gate]
    return _supports(x, weights, norm_weight, norm_position, activation, norm.MAX_COLUMNS)


supports_training = supports


def supports_backward(
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
    *rest: Tensor | None,
    activation: str,
    norm_position: str = "none",
    **options: object,
) -> str | None:
    """Why this call cannot run here, or None."""
    weights = [w_in, w_out] if w_gate is None else [w_in, w_out, w_gate]
    return _supports(x, weights, norm_weight, norm_position, activation, norm.MAX_COLUMNS_BACKWARD)


def _supports(
    x: Tensor,
    weights: list[Tensor],
    norm_weight: Tensor | None,
    norm_position: str,
    activation: str,
    max_columns: int,
) -> str | None:
    reason = linear.supports(x, weights, [], activation=activation)
    if reason is None and norm_position != "none" and norm_weight is not None:
        features = norm_weight.shape[0]
        if features > max_columns:
            reason = f"the norm is over {features} features; the Triton kernel takes up to {max_columns}"
    return reason
