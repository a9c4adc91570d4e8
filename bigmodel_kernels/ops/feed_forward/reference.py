"""Feed-forward block in plain PyTorch: the definition of right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel_kernels.ops.activations import activate, activation_backward, dropout
from bigmodel_kernels.ops.linear.reference import project, projection_backward
from bigmodel_kernels.ops.norm.reference import norm_gradients, normalize
from bigmodel_kernels.ops.registration import compute_dtype, filled


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
    """See `bigmodel_kernels.feed_forward`. The normalised input ("pre") and the hidden layer are rounded to
    the dtype of x, because a matrix unit reads them in it; all else is in the type of computation."""
    return run_training(
        *(x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias, w_gate, b_gate, dropout_seed),
        activation=activation,
        weight_layout=weight_layout,
        norm_position=norm_position,
        norm_eps=norm_eps,
        norm_kind=norm_kind,
        dropout_p=dropout_p,
        recompute=True,
    )[0]


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
    """As `run`, and what the activation, the gate's activation and a norm behind were given."""
    compute = compute_dtype(x.dtype)
    preactivation, gate_preactivation, prenorm = (x.new_empty(0) for _ in range(3))
    rows = x.to(compute)
    if norm_position == "pre":
        rows = normalize(rows, norm_weight, norm_bias, norm_eps, norm_kind).to(x.dtype).to(compute)
    z = project(rows, w_in, b_in, weight_layout)
    gate = None if w_gate is None else project(rows, w_gate, b_gate, weight_layout)
    if not recompute:
        preactivation = z.to(x.dtype)
        gate_preactivation = gate_preactivation if gate is None else gate.to(x.dtype)
    y = project(_hidden(z, gate, activation).to(x.dtype).to(compute), w_out, b_out, weight_layout)
    y = dropout(y, dropout_seed, dropout_p)
    if residual is not None:
        y = y + residual
    if norm_position == "post":
        prenorm = y.to(x.dtype)
        y = normalize(y, norm_weight, norm_bias, norm_eps, norm_kind)
    return y.to(x.dtype), preactivation, gate_preactivation, prenorm


def _hidden(z: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    return activate(z, activation) if gate is None else activate(gate, activation) * z


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
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of `bigmodel_kernels.feed_forward`, in the order of its tensors; hidden layer and normalised
    input are computed again."""
    compute = compute_dtype(x.dtype)
    (need_x, need_w_in, need_b_in, need_w_out, need_b_out, need_residual, need_norm_weight, need_norm_bias,
     need_w_gate, need_b_gate) = needs  # fmt: skip
    pre, post = norm_position == "pre", norm_position == "post"
    need_norm = need_norm_weight or need_norm_bias
    need_rows = need_x or (pre and need_norm)
    need_hidden = need_rows or need_w_in or need_b_in or need_w_gate or need_b_gate
    need_y = need_hidden or need_w_out or need_b_out or need_residual
    recompute_norm = post and prenorm is None and (need_y or need_norm)

    source = x.reshape(-1, x.shape[-1])
    rows = source
    recompute = (preactivation is None or (w_gate is not None and gate_preactivation is None)) and (
        need_hidden or need_w_out or recompute_norm
    )
    if pre and (need_w_in or need_w_gate or recompute):
        rows = normalize(source.to(compute), norm_weight, norm_bias, norm_eps, norm_kind).to(x.dtype)

    z = gate = hidden = None
    if need_hidden or need_w_out or recompute_norm:
        z = _stored_or_computed(preactivation, rows, w_in, b_in, weight_layout)
        if w_gate is not None:
            gate = _stored_or_computed(gate_preactivation, rows, w_gate, b_gate, weight_layout)
        if need_w_out or recompute_norm:
            hidden = _hidden(z, gate, activation).to(x.dtype)

    dy: Tensor | None = grad.reshape(-1, grad.shape[-1]).to(compute)
    dnorm_weight = dnorm_bias = None
    if post and dy is not None:
        if prenorm is not None:
            y = prenorm.reshape(dy.shape).to(compute)
        elif hidden is not None:
            y = dropout(project(hidden.to(compute), w_out, b_out, weight_layout), dropout_seed, dropout_p)
            if residual is not None:
                y = y + residual.reshape(y.shape)
        else:
            y = dy  # no gradient is asked for
        wanted = (need_y, need_norm_weight, need_norm_bias)
        dy, dnorm_weight, dnorm_bias = norm_gradients(
            dy, y, norm_weight, norm_bias, norm_eps, wanted, norm_kind
        )

    dx = dw_in = db_in = dw_out = db_out = dw_gate = db_gate = None
    if dy is not None and (need_hidden or need_w_out or need_b_out):
        dout = dropout(dy, dropout_seed, dropout_p)
        like = x.new_empty(()).expand(dout.shape[0], 0) if hidden is None else hidden
        dhidden, (dw_out,), (db_out,) = projection_backward(
            dout, like, [w_out], weight_layout, need_hidden, [need_w_out], [need_b_out]
        )
        if dhidden is not None and z is not None:
            dhidden = dhidden.to(compute)
            if gate is None:
                dz = activation_backward(dhidden, z, activation)
                dx, (dw_in,), (db_in,) = projection_backward(
                    dz, rows, [w_in], weight_layout, need_rows, [need_w_in], [need_b_in]
                )
            elif w_gate is not None:
                dgate = activation_backward(dhidden * z, gate, activation)
                dz = dhidden.mul_(activate(gate, activation))
                # The two products with x side by side, as those of one projection.
                dx, (dw_in, dw_gate), (db_in, db_gate) = projection_backward(
                    torch.cat((dz, dgate), -1), rows, [w_in, w_gate], weight_layout, need_rows,
                    [need_w_in, need_w_gate], [need_b_in, need_b_gate],
                )  # fmt: skip
    if pre and dx is not None:
        dx, dnorm_weight, dnorm_bias = norm_gradients(
            dx.to(compute), source.to(compute), norm_weight, norm_bias, norm_eps,
            (need_x, need_norm_weight, need_norm_bias), norm_kind,
        )  # fmt: skip
    dresidual = None
    if need_residual and dy is not None:
        dresidual = dy.view(grad.shape)
        if not post and grad.dtype == compute:
            dresidual = dresidual.clone()  # a result of an operator shares no memory with its arguments
    dx = None if dx is None else dx.view(x.shape)
    results = (
        dx, dw_in, db_in, dw_out, db_out, dresidual, dnorm_weight, dnorm_bias, dw_gate, db_gate
    )  # fmt: skip
    return filled(results, needs, x)


def _stored_or_computed(
    stored: Tensor | None, rows: Tensor, weight: Tensor, bias: Tensor | None, weight_layout: str
) -> Tensor:
    """What an activation was given, in the type of computation."""
    compute = compute_dtype(rows.dtype)
    if stored is not None:
        return stored.reshape(-1, stored.shape[-1]).to(compute)
    return project(rows.to(compute), weight, bias, weight_layout)
