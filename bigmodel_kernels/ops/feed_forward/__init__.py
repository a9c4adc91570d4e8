"""Feed-forward block: `bigmodel::feed_forward`, its training form and gradient, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.activations import ACTIVATIONS
from bigmodel_kernels.ops.linear import LAYOUTS, check_residual, check_weight
from bigmodel_kernels.ops.norm import KINDS, check_norm
from bigmodel_kernels.ops.registration import (
    backward_formula,
    call,
    define,
    differentiable,
    draw_seed,
    fake_gradients,
    given,
    gradients,
    no_second_derivative,
    placeholder,
    public,
    register_gradient,
    require_choice,
    require_dropout,
    require_float,
    require_needs,
    require_shape,
    require_vector,
    shape,
)

NORM_POSITIONS = ("none", "pre", "post")


@public
def feed_forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    weight_layout: str = "linear",
    residual: Tensor | None = None,
    norm_position: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """FFN(x) = dropout(activation(x @ W_in^T + b_in) @ W_out^T + b_out), with residual and norm.

    Gated, with w_gate: FFN(x) = dropout((activation(x @ W_gate^T + b_gate) * (x @ W_in^T + b_in)) @ W_out^T +
    b_out): SwiGLU with "silu", GeGLU with "gelu" or "gelu_tanh".

    norm_position: "none": FFN(x) + residual; "post" (BERT): norm(FFN(x) + residual); "pre" (GPT-2):
    FFN(norm(x)) + residual. Without residual nothing is added. norm_kind: "layer_norm" or "rms_norm", which
    has no bias.

    x (..., K). weight_layout "linear": w_in (F, K) and w_out (N, F); "conv1d" (GPT-2): w_in (K, F) and w_out
    (F, N); w_gate as w_in. b_in and b_gate (F,) and b_out (N,) or None, residual of the shape of the result
    (..., N); norm_weight and norm_bias (N,) for "post" and (K,) for "pre". activation: "none", "gelu",
    "gelu_tanh", "quick_gelu", "relu" or "silu". dropout_p: elements are dropped with this chance and the
    others scaled by 1 / (1 - dropout_p).

    float32, bfloat16, float16 (float64 in the reference), the same for all. Sums are in float32; the
    normalised input of "pre" and the hidden layer are rounded to the dtype, and then the result once. Under
    autocast all are cast to its dtype. Differentiable once in all tensors; a second derivative raises
    NotImplementedError. Where a gradient is wanted, what the activations were given is kept for it, F numbers
    a row (2 F gated), unless recompute: then the backward makes these products again. Gradients of weights
    are summed in float32.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: Attention Is All You Need (Vaswani et al., 2017, arXiv:1706.03762); GELU (arXiv:1606.08415); GLU
    Variants Improve Transformer (Shazeer, 2020, arXiv:2002.05202).
    """
    args, kwargs = prepare(
        x,
        w_in,
        b_in,
        w_out,
        b_out,
        activation=activation,
        weight_layout=weight_layout,
        residual=residual,
        norm_position=norm_position,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        norm_kind=norm_kind,
        w_gate=w_gate,
        b_gate=b_gate,
        dropout_p=dropout_p,
    )
    return differentiable("feed_forward", args, {**kwargs, "recompute": recompute})  # type: ignore[no-any-return]


def prepare(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    weight_layout: str = "linear",
    residual: Tensor | None = None,
    norm_position: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    recompute: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    args: tuple[Any, ...] = (x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias)
    if dropout_p:
        args = (*args, w_gate, b_gate, draw_seed(dropout_p, x.device))
    elif w_gate is not None or b_gate is not None:
        args = (*args, w_gate, b_gate)
    return args, {
        "activation": activation,
        "weight_layout": weight_layout,
        "norm_position": norm_position,
        "norm_eps": norm_eps,
        **given({"norm_kind": "layer_norm", "dropout_p": 0.0}, norm_kind=norm_kind, dropout_p=dropout_p),
    }


def check(
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
) -> list[Any]:
    """Raises for what is wrong; returns the shape of the result."""
    require_float("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (); it must have at least one dimension")
    require_choice("activation", activation, ACTIVATIONS)
    require_choice("weight_layout", weight_layout, LAYOUTS)
    require_choice("norm_position", norm_position, NORM_POSITIONS)
    require_choice("norm_kind", norm_kind, KINDS)
    hidden = check_weight("w_in", w_in, x.shape[-1], weight_layout, x)
    size = check_weight("w_out", w_out, hidden, weight_layout, x)
    if w_gate is not None:
        if check_weight("w_gate", w_gate, x.shape[-1], weight_layout, x) != hidden:
            raise ValueError(f"w_gate has shape {shape(w_gate)}; it must be that of w_in, {shape(w_in)}")
    elif b_gate is not None:
        raise ValueError("b_gate is given and w_gate is None; a bias alone is not allowed")
    if b_gate is not None:
        require_vector("b_gate", b_gate, hidden, "the number of features that w_gate gives", x)
    if b_in is not None:
        require_vector("b_in", b_in, hidden, "the number of features that w_in gives", x)
    if b_out is not None:
        require_vector("b_out", b_out, size, "the number of features that w_out gives", x)
    if norm_position == "none":
        if norm_weight is not None or norm_bias is not None:
            raise ValueError(
                "norm_position='none' with norm_weight or norm_bias; allowed are 'pre' and 'post'"
            )
    else:
        if norm_weight is None:
            raise ValueError(f"norm_weight is None with norm_position={norm_position!r}; it must be a tensor")
        normed = size if norm_position == "post" else x.shape[-1]
        check_norm(x, normed, norm_weight, norm_bias, norm_eps, "norm_", norm_kind)
    result = [*x.shape[:-1], size]
    check_residual(residual, result, x)
    require_dropout(dropout_p, dropout_seed, "x", x)
    return result


def _run(*args: Any, **options: Any) -> Tensor:
    check(*args, **options)
    return backends.run("feed_forward", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return x.new_empty(check(x, *args, **options))


def _run_training(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    check(*args, **options)
    return backends.run("feed_forward_training", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _hidden_shape(x: Tensor, w_in: Tensor, weight_layout: str) -> list[Any]:
    return [*x.shape[:-1], w_in.shape[1 if weight_layout == "conv1d" else 0]]


def _fake_training(x: Tensor, w_in: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    size = check(x, w_in, *args, **options)
    hidden = _hidden_shape(x, w_in, options.get("weight_layout", "linear"))
    keep = not options.get("recompute", False)
    gated = len(args) > 6 and args[6] is not None
    post = options.get("norm_position", "none") == "post"
    return (
        x.new_empty(size),
        x.new_empty(hidden if keep else (0,)),
        x.new_empty(hidden if keep and gated else (0,)),
        x.new_empty(size if post else (0,)),
    )


_BACKWARD = (
    "x", "w_in", "b_in", "w_out", "b_out", "residual", "norm_weight", "norm_bias", "w_gate", "b_gate"
)  # fmt: skip


def _check_backward(
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
    needs: Sequence[bool],
    **options: Any,
) -> list[Any]:
    """Raises for what is wrong; returns the shapes of all gradients.

    residual is read where prenorm has to be computed again, and may be None otherwise, with a gradient.
    """
    tensors = (x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias, w_gate, b_gate)
    result = check(*tensors, dropout_seed, **options)
    require_shape("grad", grad, result, x)
    hidden = _hidden_shape(x, w_in, options.get("weight_layout", "linear"))
    require_shape("preactivation", preactivation, hidden, x)
    require_shape("gate_preactivation", gate_preactivation, hidden, x)
    require_shape("prenorm", prenorm, result, x)
    named = zip(_BACKWARD, tensors, strict=True)
    require_needs(needs, _BACKWARD, [name for name, t in named if t is None and name != "residual"])
    sizes: list[Any] = [(0,) if tensor is None else tensor.shape for tensor in tensors]
    sizes[5] = result
    return sizes


def _run_backward(*args: Any, **options: Any) -> list[Tensor]:
    _check_backward(*args, **options)
    return backends.run("feed_forward_backward", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_backward(grad: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    return fake_gradients(grad, _check_backward(grad, *args, **options), options["needs"])


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs, None, None, None)
    ctx.options, ctx.size = keyword_only_inputs, None


def _setup_context_training(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    _, preactivation, gate_preactivation, prenorm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(preactivation, gate_preactivation, prenorm)
    x, w_in, b_in, w_out, b_out, _, norm_weight, norm_bias, w_gate, b_gate, seed = inputs
    recompute = keyword_only_inputs["recompute"]
    ctx.options = {key: value for key, value in keyword_only_inputs.items() if key != "recompute"}
    ctx.size = x.shape
    position = ctx.options["norm_position"]
    weights_read_x = w_in.requires_grad or (w_gate is not None and w_gate.requires_grad)
    keep_x = recompute or position == "pre" or weights_read_x
    ctx.save_for_backward(
        x if keep_x else placeholder(x, ()),
        *(w_in, b_in, w_out, b_out, None, norm_weight, norm_bias, w_gate, b_gate, seed),
        None if recompute else preactivation,
        None if recompute or w_gate is None else gate_preactivation,
        prenorm if position == "post" else None,
    )


@backward_formula(11)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    x, *rest = saved
    if grad is None:
        return (None,) * 11
    if ctx.size is not None and x.shape != ctx.size:
        x = placeholder(x, ctx.size)
    asked = list(needs[:10])
    # Without a norm behind, the gradient of the residual is that of the result.
    given_on = asked[5] and ctx.options["norm_position"] != "post"
    asked[5] = asked[5] and not given_on
    results = gradients(call("feed_forward_backward", grad, x, *rest, **ctx.options, needs=asked), asked)
    if given_on:
        results[5] = grad
    return (*results, None)


_TENSORS = (
    "Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, Tensor? residual=None, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? w_gate=None, Tensor? b_gate=None, "
    "Tensor? dropout_seed=None"
)
_OPTIONS = (
    'str activation, str weight_layout="linear", str norm_position="none", float norm_eps=1e-5, '
    'str norm_kind="layer_norm", float dropout_p=0.0'
)
define(f"feed_forward({_TENSORS}, *, {_OPTIONS}) -> Tensor", _run, _fake, autocast="lower", rows=(0, 5))
define(
    f"feed_forward_training({_TENSORS}, *, {_OPTIONS}, bool recompute=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_training,
    _fake_training,
    autocast="lower",
    rows=(0, 5),
)
define(
    f"feed_forward_backward(Tensor grad, {_TENSORS}, Tensor? preactivation=None, "
    f"Tensor? gate_preactivation=None, Tensor? prenorm=None, *, {_OPTIONS}, bool[] needs) -> Tensor[]",
    _run_backward,
    _fake_backward,
    rows=(0, 1, 6, 12, 13, 14),
    row_results=(0, 5),
)
register_gradient("feed_forward", _backward, _setup_context)
register_gradient("feed_forward_training", _backward, _setup_context_training)
no_second_derivative("feed_forward_backward", "torch.nn.functional.linear and the activation")
