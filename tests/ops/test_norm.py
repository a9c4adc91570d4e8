"""LayerNorm and RMSNorm: against float64, their gradients, their arguments."""

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
    require,
    with_seed,
)

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.ops.norm import prepare, prepare_rms_norm
from bigmodel_kernels.ops.philox import keep_elements

X, W, B = torch.randn(2, 3, 5), torch.randn(5), torch.randn(5)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "all": ((X, W, B, 1e-5, torch.randn(2, 3, 5)), {}),
    "no residual": ((X, W, B), {"eps": 1e-3}),
    "no bias": ((X, W, None, 1e-5), {"residual": torch.randn(2, 3, 5)}),
    "no weight": ((X, None, None), {}),
}
calls = pytest.mark.parametrize("name", CALLS)
RMS_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "all": ((X, W, 1e-5, torch.randn(2, 3, 5)), {"weight_offset": 1.0}),
    "no residual": ((X, W), {"eps": 1e-3}),
    "no weight": ((X, None), {}),
}
rms_calls = pytest.mark.parametrize("name", RMS_CALLS)


@pytest.mark.parametrize("case", list(verify.cases("layer_norm")), ids=str)
def test_against_float64(case: verify.Case, cpu_backend: str) -> None:
    check_case(case, cpu_backend)


@pytest.mark.parametrize("case", list(verify.cases("rms_norm")), ids=str)
def test_rms_norm_against_float64(case: verify.Case, rms_backend: str) -> None:
    check_case(case, rms_backend)


@pytest.fixture(params=["reference", "native"])
def rms_backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    with backends.use(name):
        error = bk.explain("rms_norm", X, W).error
    if error is not None:
        pytest.skip(error)
    return name


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
    check_gradients(bk.layer_norm, CALLS[name], second=True)
    check_each_gradient_alone(bk.layer_norm, CALLS[name])
    dropped = (CALLS[name][0], {**CALLS[name][1], "dropout_p": 0.4})
    function = with_seed(torch.ops.bigmodel.layer_norm, prepare)
    check_gradients(function, dropped)
    check_each_gradient_alone(function, dropped)


@rms_calls
def test_rms_norm_gradients(name: str) -> None:
    check_gradients(bk.rms_norm, RMS_CALLS[name], second=True)
    check_each_gradient_alone(bk.rms_norm, RMS_CALLS[name])
    dropped = (RMS_CALLS[name][0], {**RMS_CALLS[name][1], "dropout_p": 0.4})
    function = with_seed(torch.ops.bigmodel.rms_norm, prepare_rms_norm)
    check_gradients(function, dropped)
    check_each_gradient_alone(function, dropped)
    check_compiled(bk.rms_norm, RMS_CALLS[name])
    check_checkpointed(bk.rms_norm, RMS_CALLS[name])


@rms_calls
def test_rms_norm_opcheck(name: str, rms_backend: str) -> None:
    args, kwargs = RMS_CALLS[name]
    args, options = prepare_rms_norm(args[0].clone().requires_grad_(), *args[1:], **kwargs)
    check_operator(torch.ops.bigmodel.rms_norm.default, (args, options), rms_backend)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", [[True] * 4, [True, False, False, False], [False, True, True, False]])
def test_opcheck_of_the_gradient(kind: str, p: float, needs: list[bool], cpu_backend: str) -> None:
    needs = [*needs[:3], needs[3] and kind == "layer_norm"]
    bias = B if kind == "layer_norm" else None
    args = (torch.randn_like(X), X, W, bias, torch.randn_like(X), torch.tensor(5) if p else None)
    options = {"kind": kind, "eps": 1e-5, "dropout_p": p, "needs": needs}
    require(cpu_backend, "norm_backward", args, options)
    check_operator(torch.ops.bigmodel.norm_backward.default, (args, options), cpu_backend)
    with backends.use(cpu_backend):
        results = torch.ops.bigmodel.norm_backward(*args, **options)
    assert [r.numel() > 0 for r in results] == needs


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_dropout_is_that_of_elements_before_the_residual(kind: str) -> None:
    x, residual = X.double().requires_grad_(), torch.randn(2, 3, 5).double()
    if kind == "layer_norm":
        args, options = prepare(x, W.double(), B.double(), 1e-5, residual, dropout_p=0.3)
    else:
        args, options = prepare_rms_norm(x, W.double(), 1e-5, residual, dropout_p=0.3)
    total = x * keep_elements(args[-1], 0.3, 6, 5, torch.float64, "cpu").view(2, 3, 5) + residual
    out = getattr(torch.ops.bigmodel, kind)(*args, **options)
    if kind == "layer_norm":
        expected = F.layer_norm(total, (5,), W.double(), B.double())
    else:
        expected = F.rms_norm(total, (5,), W.double(), 1e-5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    )


@pytest.mark.parametrize("function", [bk.layer_norm, lambda x, w, b: bk.rms_norm(x, w)])
def test_under_vmap(function: Any) -> None:
    x, weights = torch.randn(4, 3, 5), torch.randn(4, 5)
    expected = torch.stack([function(row, W, B) for row in x])
    torch.testing.assert_close(torch.vmap(function, in_dims=(0, None, None))(x, W, B), expected)
    expected = torch.stack([function(row, w, B) for row, w in zip(x, weights, strict=True)])
    torch.testing.assert_close(torch.vmap(function, in_dims=(0, 0, None))(x, weights, B), expected)

    def backward(row: torch.Tensor, needs: list[bool]) -> Any:
        options = {"kind": "layer_norm", "eps": 1e-5, "needs": needs}
        return torch.ops.bigmodel.norm_backward(row, row, W, B, **options)

    for needs in ([True, False, False, False], [True, False, True, True]):
        mapped = torch.vmap(lambda row, n=needs: backward(row, n))(x)
        for i, row in enumerate(x):
            for one, all_of_them in zip(backward(row, needs), mapped, strict=True):
                if one.numel():
                    torch.testing.assert_close(all_of_them[i], one)


def test_rms_norm_autocast_is_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = bk.rms_norm(X.bfloat16(), W)
    torch.testing.assert_close(out, F.rms_norm(X.bfloat16().float(), (5,), W, 1e-6))
    assert out.dtype == torch.float32


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


def test_bad_arguments_of_rms_norm_and_the_gradient() -> None:
    check_refused(bk.rms_norm, (X, W[:4]), {}, ValueError, r"weight has shape \(4,\); it must be \(5,\)")
    check_refused(bk.rms_norm, (X, W, -1.0), {}, ValueError, "eps=-1.0 is out of range")
    check_refused(bk.rms_norm, (X, W), {"dropout_p": 2.0}, ValueError, "dropout_p=2.0 is out of range")
    check_refused(bk.layer_norm, (X, W, B), {"dropout_p": 1.0}, ValueError, "dropout_p=1.0 is out of range")
    backward, options = torch.ops.bigmodel.norm_backward, {"kind": "layer_norm", "eps": 1e-5}
    needs = [True] * 4
    for args, changes, message in (
        ((X[0], X, W, B), {}, r"grad has shape \(3, 5\); it must be \(2, 3, 5\)"),
        ((X, X, W, None), {}, "asks for the gradient of bias, which is None"),
        ((X, X, W, B), {"kind": "x"}, "kind='x' is unknown; allowed are 'layer_norm', 'rms_norm'"),
        ((X, X, W, B), {"kind": "rms_norm"}, "bias is given with kind='rms_norm'"),
        ((X, X, W, B), {"needs": [True]}, "needs holds 1 values; it must hold 4, for x, residual, weight"),
    ):
        check_refused(backward, args, {**options, "needs": needs, **changes}, ValueError, message)


@pytest.mark.parametrize("args, kind, message", BAD, ids=[b[2][:40] for b in BAD])
def test_bad_arguments(args: Any, kind: type[Exception], message: str) -> None:
    check_refused(bk.layer_norm, args, {}, kind, message)
    args = (*args, 1e-5) if len(args) < 4 else args
    check_refused(torch.ops.bigmodel.layer_norm, args, {}, kind, message)
