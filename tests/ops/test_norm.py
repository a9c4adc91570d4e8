"""LayerNorm: against float64, its gradients, its arguments."""

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

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify

X, W, B = torch.randn(2, 3, 5), torch.randn(5), torch.randn(5)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "all": ((X, W, B, 1e-5, torch.randn(2, 3, 5)), {}),
    "no residual": ((X, W, B), {"eps": 1e-3}),
    "no bias": ((X, W, None, 1e-5), {"residual": torch.randn(2, 3, 5)}),
    "no weight": ((X, None, None), {}),
}
calls = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("case", list(verify.cases("layer_norm")), ids=str)
def test_against_float64(case: verify.Case, cpu_backend: str) -> None:
    check_case(case, cpu_backend)


@given(
    rows=st.integers(0, 40),
    size=st.integers(1, 300),
    extras=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_any_shape(backend: str, rows: int, size: int, extras: tuple[bool, bool, bool], seed: int) -> None:
    if backend == "native" and (reason := _native.reason()):
        pytest.skip(reason)
    torch.manual_seed(seed)
    x = torch.randn(rows, size)
    weight, bias, residual = extras
    parameters = [torch.randn(size) if given else None for given in (weight, weight and bias)]
    other = torch.randn(rows, size) if residual else None
    with backends.use(backend):
        out = bk.layer_norm(x, *parameters, 1e-3, other)
    double = [None if t is None else t.double() for t in (x, *parameters, other)]
    expected = verify.layer_norm_formula(double[0], double[1], double[2], 1e-3, double[3])  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)


def test_one_feature_leaves_the_bias(cpu_backend: str) -> None:
    with backends.use(cpu_backend):
        out = bk.layer_norm(torch.randn(7, 1), torch.randn(1), torch.tensor([3.0]))
    assert torch.equal(out, torch.full((7, 1), 3.0))


@calls
def test_gradients(name: str) -> None:
    check_gradients(bk.layer_norm, CALLS[name])
    check_each_gradient_alone(bk.layer_norm, CALLS[name])


@calls
def test_opcheck(name: str, cpu_backend: str) -> None:
    args, kwargs = CALLS[name]
    args = (args[0].clone().requires_grad_(), *args[1:], *([1e-5] if len(args) < 4 else []))
    options = {k: v for k, v in kwargs.items() if k != "eps"}
    check_operator(torch.ops.bigmodel.layer_norm.default, (args, options), cpu_backend)


@calls
def test_compiled_and_checkpointed(name: str) -> None:
    check_compiled(bk.layer_norm, CALLS[name])
    check_checkpointed(bk.layer_norm, CALLS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_in_float32(dtype: torch.dtype, cpu_backend: str) -> None:
    x = X.to(dtype).requires_grad_()
    with backends.use(cpu_backend), torch.autocast("cpu", dtype):
        out = bk.layer_norm(x, W, B, 1e-5, X)
        out.square().sum().backward()
    torch.testing.assert_close(out, F.layer_norm(x.float() + X, (5,), W, B))
    assert out.dtype == torch.float32 and x.grad is not None and x.grad.dtype == dtype


def test_inputs_of_any_strides(cpu_backend: str) -> None:
    x, residual = torch.randn(5, 4).t(), torch.randn(4, 10)[:, ::2]
    with backends.use(cpu_backend):
        out = bk.layer_norm(x, W, B, 1e-5, residual)
    torch.testing.assert_close(out, F.layer_norm(x + residual, (5,), W, B))
    assert out.is_contiguous()


BAD: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((X.int(), W, B), TypeError, "x has dtype torch.int32; allowed are"),
    ((torch.tensor(1.0), W, B), ValueError, r"x has shape \(\)"),
    ((torch.zeros(3, 0), W, B), ValueError, r"x has shape \(3, 0\)"),
    ((X, W[:4], B), ValueError, r"weight has shape \(4,\); it must be \(5,\)"),
    ((X, W, B[None]), ValueError, r"bias has shape \(1, 5\)"),
    ((X, W.half(), B), TypeError, "weight has dtype torch.float16"),
    ((X, W, B.to("meta")), ValueError, "bias is on meta"),
    ((X, None, B), ValueError, "bias is given and weight is None"),
    ((X, W, B, -1.0), ValueError, "eps=-1.0 is out of range"),
    ((X, W, B, 1e-5, X[0]), ValueError, r"residual has shape \(3, 5\); it must be that of x, \(2, 3, 5\)"),
    ((X, W, B, 1e-5, X.double()), TypeError, "residual has dtype torch.float64"),
]


@pytest.mark.parametrize("args, kind, message", BAD, ids=[b[2][:40] for b in BAD])
def test_bad_arguments(args: Any, kind: type[Exception], message: str) -> None:
    check_refused(bk.layer_norm, args, {}, kind, message)
    args = (*args, 1e-5) if len(args) < 4 else args
    check_refused(torch.ops.bigmodel.layer_norm, args, {}, kind, message)
