"""Feed-forward block: against float64, its gradients, its arguments."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import (
    Sizes,
    check_case,
    check_checkpointed,
    check_compiled,
    check_each_gradient_alone,
    check_gradients,
    check_operator,
    check_refused,
    kept_or_dropped,
    require,
    with_seed,
)
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.ops.feed_forward import prepare, reference
from bigmodel_kernels.ops.philox import keep_elements

X, W_IN, B_IN = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
W_OUT, B_OUT, NORM = (
    torch.randn(4, 6),
    torch.randn(4),
    {"norm_weight": torch.randn(4), "norm_bias": torch.randn(4)},
)
ARGS = (X, W_IN, B_IN, W_OUT, B_OUT)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((X, W_IN, None, W_OUT, None), {"activation": "gelu"}),
    "bert": (ARGS, {"activation": "gelu", "residual": torch.randn(3, 4), "norm_position": "post", **NORM}),
    "gpt2": (
        (X[None], W_IN.t().contiguous(), B_IN, W_OUT.t().contiguous(), B_OUT),
        {
            "activation": "gelu_tanh",
            "weight_layout": "conv1d",
            "residual": torch.randn(1, 3, 4),
            "norm_position": "pre",
            **NORM,
        },
    ),
    "post, no norm bias": (
        ARGS,
        {"activation": "silu", "norm_position": "post", "norm_weight": NORM["norm_weight"]},
    ),
    "quick_gelu": (ARGS, {"activation": "quick_gelu"}),
    "llama": (
        (X, W_IN, None, W_OUT, None),
        {
            "activation": "silu",
            "w_gate": torch.randn(6, 4),
            "residual": torch.randn(3, 4),
            "norm_position": "pre",
            "norm_kind": "rms_norm",
            "norm_weight": torch.randn(4),
        },
    ),
    "GeGLU, conv1d, post": (
        (X, W_IN.t().contiguous(), B_IN, W_OUT.t().contiguous(), B_OUT),
        {
            "activation": "gelu_tanh",
            "weight_layout": "conv1d",
            "w_gate": torch.randn(4, 6),
            "b_gate": torch.randn(6),
            "norm_position": "post",
            **NORM,
        },
    ),
}
DROPOUT: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    name: (args, {**kwargs, "dropout_p": 0.4}) for name, (args, kwargs) in CALLS.items()
}
calls = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("case", list(verify.cases("feed_forward")), ids=str)
def test_against_float64(case: verify.Case, cpu_backend: str) -> None:
    check_case(case, cpu_backend)


@given(
    rows=st.integers(0, 40),
    sizes=st.tuples(st.integers(3, 70), st.integers(1, 150)),
    layout=st.sampled_from(["linear", "conv1d"]),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]),
    position=st.sampled_from(["none", "pre", "post"]),
    extras=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_any_shape(
    backend: str,
    rows: int,
    sizes: tuple[int, int],
    layout: str,
    activation: str,
    position: str,
    extras: tuple[bool, bool, bool],
    seed: int,
) -> None:
    if backend == "native" and (reason := _native.reason()):
        pytest.skip(reason)
    torch.manual_seed(seed)
    size, hidden = sizes
    w_in, w_out = torch.randn(hidden, size) * size**-0.5, torch.randn(size, hidden) * hidden**-0.5
    if layout == "conv1d":
        w_in, w_out = w_in.t().contiguous(), w_out.t().contiguous()
    options: dict[str, Any] = {"weight_layout": layout, "activation": activation, "norm_position": position}
    bias_in, bias_out, residual = extras
    if residual:
        options["residual"] = torch.randn(rows, size)
    if position != "none":
        options |= {"norm_weight": torch.randn(size), "norm_bias": torch.randn(size), "norm_eps": 1e-3}
    args = (
        torch.randn(rows, size),
        w_in,
        torch.randn(hidden) if bias_in else None,
        w_out,
        torch.randn(size) if bias_out else None,
    )
    with backends.use(backend):
        out = bk.feed_forward(*args, **options)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = verify.feed_forward_formula(*(None if a is None else a.double() for a in args), **double)
    torch.testing.assert_close(out.double(), expected, atol=5e-4, rtol=1e-4)


@calls
def test_gradients(name: str) -> None:
    check_gradients(bk.feed_forward, CALLS[name], second=True)
    check_each_gradient_alone(bk.feed_forward, CALLS[name])


@pytest.mark.parametrize("way", ["plain", "training", "recompute"])
@calls
def test_gradients_with_dropout(name: str, way: str) -> None:
    """The forward and the backward drop the same elements, whatever was kept."""
    operator = torch.ops.bigmodel.feed_forward if way == "plain" else torch.ops.bigmodel.feed_forward_training
    if way == "recompute":
        operator = functools.partial(operator, recompute=True)
    function = with_seed(operator, prepare)
    check_gradients(function, DROPOUT[name])
    check_each_gradient_alone(function, DROPOUT[name])


@calls
def test_opcheck(name: str, cpu_backend: str) -> None:
    args, kwargs = CALLS[name]
    args, kwargs = prepare(*args, **kwargs)
    require(cpu_backend, "feed_forward", args, kwargs)
    check_operator(torch.ops.bigmodel.feed_forward.default, (args, kwargs), cpu_backend)
    training = (args, {**kwargs, "recompute": name == "bert"})
    check_operator(torch.ops.bigmodel.feed_forward_training.default, training, cpu_backend)


@kept_or_dropped(CALLS, DROPOUT)
@calls
def test_opcheck_of_the_gradient(name: str, calls_of: Any, stored: bool, cpu_backend: str) -> None:
    args, kwargs = calls_of[name]
    args, kwargs = prepare(*args, **kwargs)
    args = (*args, *[None] * (11 - len(args)))
    require(cpu_backend, "feed_forward_training", args, kwargs)
    out, *saved = torch.ops.bigmodel.feed_forward_training(*args, **kwargs)
    kept = [t if t.numel() and stored else None for t in saved]
    needs = [tensor is not None for tensor in args[:10]]
    call = ((torch.randn_like(out), *args, *kept), {**kwargs, "needs": needs})
    check_operator(torch.ops.bigmodel.feed_forward_backward.default, call, cpu_backend)


def test_opcheck_with_gradients(cpu_backend: str) -> None:
    args, kwargs = CALLS["bert"]
    leaves = [t.clone().requires_grad_() for t in args]
    check_operator(torch.ops.bigmodel.feed_forward.default, prepare(*leaves, **kwargs), cpu_backend)


@calls
def test_compiled_and_checkpointed(name: str) -> None:
    check_compiled(bk.feed_forward, CALLS[name])
    check_checkpointed(bk.feed_forward, CALLS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, cpu_backend: str) -> None:
    args, kwargs = CALLS["bert"]
    w_in = W_IN.clone().requires_grad_()
    with backends.use(cpu_backend):
        with torch.autocast("cpu", dtype):
            out = bk.feed_forward(X, w_in, *args[2:], **kwargs)
            out.float().square().sum().backward()
        low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        assert torch.equal(
            out, bk.feed_forward(X.to(dtype), w_in.to(dtype), *(t.to(dtype) for t in args[2:]), **low)
        )
    assert out.dtype == dtype
    assert w_in.grad is not None and w_in.grad.dtype == torch.float32


def test_inputs_of_any_strides(cpu_backend: str) -> None:
    x, residual = torch.randn(4, 3).t(), torch.randn(4, 6)[:, ::2].t()
    with backends.use(cpu_backend):
        out = bk.feed_forward(x, *ARGS[1:], activation="relu", residual=residual)
    torch.testing.assert_close(out, F.linear(F.linear(x, W_IN, B_IN).relu(), W_OUT, B_OUT) + residual)
    assert out.is_contiguous()


@pytest.mark.parametrize("position", ["none", "pre", "post"])
def test_dropout_is_that_of_elements_before_the_residual(position: str) -> None:
    x, w_in, b_in, w_out, b_out = (t.double().requires_grad_() for t in ARGS)
    residual = torch.randn(3, 4).double().requires_grad_()
    norm = {} if position == "none" else {k: v.double() for k, v in NORM.items()}
    args, kwargs = prepare(
        *(x, w_in, b_in, w_out, b_out),
        **{"activation": "relu", "residual": residual, "norm_position": position, "dropout_p": 0.3, **norm},
    )
    keep = keep_elements(args[10], 0.3, 3, 4, torch.float64, "cpu")
    out = torch.ops.bigmodel.feed_forward_training(*args, **kwargs)[0]

    def normed(t: Tensor, where: str) -> Tensor:
        return F.layer_norm(t, (4,), *norm.values()) if where == position else t

    hidden = F.relu(F.linear(normed(x, "pre"), w_in, b_in))
    expected = normed(F.linear(hidden, w_out, b_out) * keep + residual, "post")
    torch.testing.assert_close(out, expected)
    leaves = (x, w_in, b_in, w_out, b_out, residual)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def test_recompute_keeps_no_hidden_layer(cpu_backend: str) -> None:
    """And gives the same gradients."""
    args, kwargs = CALLS["bert"]
    args = tuple(a.clone().requires_grad_() for a in args)
    results = []
    with backends.use(cpu_backend):
        for recompute in (False, True):
            kept: list[tuple[int, ...]] = []

            def pack(tensor: Tensor, kept: list[tuple[int, ...]] = kept) -> Tensor:
                kept.append(tuple(tensor.shape))
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = bk.feed_forward(*args, **kwargs, recompute=recompute)
            assert ((3, 6) in kept) != recompute
            results.append(torch.autograd.grad(out.square().sum(), args))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "needs, products", [((0,), 2), ((1,), 2), ((3,), 1), ((4,), 0), ((5,), 0), ((2,), 1), ((0, 1, 3), 4)]
)
def test_only_what_is_needed_is_computed(
    needs: tuple[int, ...], products: int, stored: bool, gated: bool
) -> None:
    args = [*ARGS, torch.randn(3, 4), NORM["norm_weight"], None, torch.randn(6, 4) if gated else None, None]
    options: dict[str, Any] = {"activation": "silu", "norm_position": "post"}
    out, *saved = reference.run_training(*args, **options)
    kept = [t if t.numel() and stored else None for t in saved]
    asked = [i in needs for i in range(10)]
    with Sizes() as sizes:
        results = reference.run_backward(torch.randn_like(out), *args, None, *kept, **options, needs=asked)
    again = 0 if stored else 3 if gated else 2  # the projections, and the product that the norm is of
    second = gated and 0 in needs  # the gate's part of the gradient of x
    assert sizes.products == products + again + second
    assert [r.numel() > 0 for r in results] == asked


def test_under_vmap() -> None:
    x = torch.randn(5, 3, 4)
    args, kwargs = CALLS["bert"]

    def function(x: Tensor, w: Tensor) -> Tensor:
        return bk.feed_forward(x, w, *args[2:], **kwargs)

    expected = torch.stack([function(x[i], W_IN) for i in range(5)])
    torch.testing.assert_close(torch.vmap(function, in_dims=(0, None))(x, W_IN), expected)
    weights = torch.randn(5, 6, 4)
    expected = torch.stack([function(x[i], weights[i]) for i in range(5)])
    torch.testing.assert_close(torch.vmap(function)(x, weights), expected)
    needs = [True, *[False] * 9]

    def backward(x: Tensor) -> Tensor:
        return torch.ops.bigmodel.feed_forward_backward(x, x, *args[1:], activation="gelu", needs=needs)[0]

    torch.testing.assert_close(torch.vmap(backward)(x), torch.stack([backward(row) for row in x]))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_training_step(recompute: bool) -> None:
    """Forward, backward and optimizer in one graph, with dropout; the loss falls."""
    torch._dynamo.reset()
    parameters = [t.clone().requires_grad_() for t in ARGS[1:]]
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    x, target = torch.randn(64, 4), torch.randn(64, 4)

    def step() -> Tensor:
        out = bk.feed_forward(
            x, *parameters, activation="gelu", residual=x, norm_position="pre", **NORM, dropout_p=0.1,
            recompute=recompute,
        )  # fmt: skip
        return (out - target).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = compiled()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


GELU = {"activation": "gelu"}
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((X.int(), *ARGS[1:]), GELU, TypeError, "x has dtype torch.int32; allowed are"),
    ((X, W_IN.half(), *ARGS[2:]), GELU, TypeError, "w_in has dtype torch.float16"),
    ((X, W_IN[:, :3], *ARGS[2:]), GELU, ValueError, "w_in has shape .* takes 3 features; its input has 4"),
    (
        (X, W_IN, B_IN, W_OUT[:, :5], None),
        GELU,
        ValueError,
        "w_out has shape .* takes 5 features; its input has 6",
    ),
    ((X, W_IN, B_IN, W_OUT[0], None), GELU, ValueError, r"w_out has shape \(6,\); it must have 2 dimensions"),
    ((X, W_IN, B_IN, W_OUT.to("meta"), None), GELU, ValueError, "w_out is on meta"),
    ((X, W_IN, B_OUT, W_OUT, B_OUT), GELU, ValueError, r"b_in has shape \(4,\); it must be \(6,\)"),
    ((X, W_IN, B_IN, W_OUT, B_IN), GELU, ValueError, r"b_out has shape \(6,\); it must be \(4,\)"),
    (ARGS, {"activation": "swish"}, ValueError, "activation='swish' is unknown; allowed are"),
    (ARGS, {**GELU, "weight_layout": "x"}, ValueError, "weight_layout='x' is unknown"),
    (
        ARGS,
        {**GELU, "norm_position": "both"},
        ValueError,
        "norm_position='both' is unknown; allowed are 'none'",
    ),
    (ARGS, {**GELU, "norm_position": "pre"}, ValueError, "norm_weight is None with norm_position='pre'"),
    (ARGS, {**GELU, **NORM}, ValueError, "norm_position='none' with norm_weight"),
    (
        ARGS,
        {**GELU, "norm_position": "post", "norm_weight": B_IN},
        ValueError,
        r"norm_weight has shape \(6,\)",
    ),
    (ARGS, {**GELU, "w_gate": W_IN[:5]}, ValueError, r"w_gate has shape \(5, 4\); it must be that of w_in"),
    (ARGS, {**GELU, "w_gate": W_IN.half()}, TypeError, "w_gate has dtype torch.float16"),
    (ARGS, {**GELU, "b_gate": B_IN}, ValueError, "b_gate is given and w_gate is None"),
    (ARGS, {**GELU, "w_gate": W_IN, "b_gate": B_OUT}, ValueError, r"b_gate has shape \(4,\); it must be"),
    (ARGS, {**GELU, "dropout_p": 1.0}, ValueError, "dropout_p=1.0 is out of range"),
    (ARGS, {**GELU, "norm_kind": "x"}, ValueError, "norm_kind='x' is unknown; allowed are 'layer_norm'"),
    (
        ARGS,
        {**GELU, "norm_position": "post", "norm_kind": "rms_norm", **NORM},
        ValueError,
        "norm_bias is given with norm_kind='rms_norm'",
    ),
    (ARGS, {**GELU, "residual": X[:2]}, ValueError, r"residual has shape \(2, 4\); .* \(3, 4\)"),
]


@pytest.mark.parametrize("args, kwargs, kind, message", BAD, ids=[b[3][:40] for b in BAD])
def test_bad_arguments(args: Any, kwargs: Any, kind: type[Exception], message: str) -> None:
    check_refused(bk.feed_forward, args, kwargs, kind, message)
    args, kwargs = prepare(*args, **kwargs)
    check_refused(torch.ops.bigmodel.feed_forward, args, kwargs, kind, message)
