"""Feed-forward block: against float64, its gradients, its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import (
    check_case,
    check_checkpointed,
    check_compiled,
    check_each_gradient_alone,
    check_gradients,
    check_operator,
    check_refused,
)
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.ops.feed_forward import prepare

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
    check_gradients(bk.feed_forward, CALLS[name])
    check_each_gradient_alone(bk.feed_forward, CALLS[name])


@calls
def test_opcheck(name: str, cpu_backend: str) -> None:
    args, kwargs = CALLS[name]
    check_operator(torch.ops.bigmodel.feed_forward.default, prepare(*args, **kwargs), cpu_backend)


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
    (ARGS, {**GELU, "residual": X[:2]}, ValueError, r"residual has shape \(2, 4\); .* \(3, 4\)"),
]


@pytest.mark.parametrize("args, kwargs, kind, message", BAD, ids=[b[3][:40] for b in BAD])
def test_bad_arguments(args: Any, kwargs: Any, kind: type[Exception], message: str) -> None:
    check_refused(bk.feed_forward, args, kwargs, kind, message)
    args, kwargs = prepare(*args, **kwargs)
    check_refused(torch.ops.bigmodel.feed_forward, args, kwargs, kind, message)
