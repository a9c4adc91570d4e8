"""Linear and cross-entropy in one: against torch and float64, its gradients, memory and arguments."""

from __future__ import annotations

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
)
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import backends, verify
from bigmodel_kernels.ops.cross_entropy import prepare, reference

X, W, B = torch.randn(7, 4), torch.randn(5, 4), torch.randn(5)
TARGET = torch.tensor([0, 4, -100, 2, 2, 1, -100])
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "mean": ((X, W, TARGET), {}),
    "bias": ((X, W, TARGET, B), {}),
    "sum, smoothed": ((X, W, TARGET, B), {"reduction": "sum", "label_smoothing": 0.2}),
    "none": ((X, W, TARGET, B), {"reduction": "none"}),
    "none, smoothed": ((X, W, TARGET), {"reduction": "none", "label_smoothing": 0.7}),
    "other ignore_index": ((X, W, TARGET % 5, B), {"ignore_index": 2}),
}
calls = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    with backends.use(name):
        error = bk.explain("linear_cross_entropy", X, W, TARGET).error
    if error is not None:
        pytest.skip(error)
    return name


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two rows, so that small inputs have several."""
    monkeypatch.setattr(reference, "chunk_rows", lambda *_: 2)


@pytest.mark.parametrize("case", list(verify.cases("linear_cross_entropy")), ids=str)
def test_against_float64(case: verify.Case, backend: str) -> None:
    check_case(case, backend)


@given(
    rows=st.integers(0, 90),
    features=st.integers(1, 40),
    classes=st.integers(1, 300),
    options=st.fixed_dictionaries(
        {
            "reduction": st.sampled_from(["mean", "sum", "none"]),
            "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
            "ignore_index": st.sampled_from([-100, 0]),
        }
    ),
    bias=st.booleans(),
    ignored=st.floats(0, 1),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_is_torchs_cross_entropy(
    rows: int,
    features: int,
    classes: int,
    options: dict[str, Any],
    bias: bool,
    ignored: float,
    scale: float,
    seed: int,
) -> None:
    """Value and gradients, in float64, where nothing but a mistake makes a difference."""
    torch.manual_seed(seed)
    x = (torch.randn(rows, features, dtype=torch.float64) * scale).requires_grad_()
    weight = torch.randn(classes, features, dtype=torch.float64, requires_grad=True)
    b = torch.randn(classes, dtype=torch.float64, requires_grad=True) if bias else None
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = options["ignore_index"]
    leaves = [t for t in (x, weight, b) if t is not None]
    expected = F.cross_entropy(F.linear(x, weight, b), target, **options)
    loss = bk.linear_cross_entropy(x, weight, target, b, **options)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    if expected.isfinite().all():
        torch.testing.assert_close(
            torch.autograd.grad(loss.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        )


@pytest.mark.parametrize("rows", [0, 1, 2, 33])
@pytest.mark.parametrize("classes", [1, 2, 65, 1009])
def test_any_backend_on_small_sizes(rows: int, classes: int, backend: str) -> None:
    x, weight = torch.randn(rows, 24, requires_grad=True), torch.randn(classes, 24, requires_grad=True)
    bias = torch.randn(classes, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    for reduction in ("sum", "none"):
        with backends.use(backend):
            loss = bk.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
            gradients = torch.autograd.grad(loss.sum(), (x, weight, bias))
        expected = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected.sum(), (x, weight, bias)), atol=2e-5, rtol=1e-5
        )


@calls
def test_gradients(name: str, small_chunks: None) -> None:
    check_gradients(bk.linear_cross_entropy, CALLS[name], second=True)
    check_each_gradient_alone(bk.linear_cross_entropy, CALLS[name])


@calls
def test_opcheck(name: str, backend: str) -> None:
    args, kwargs = CALLS[name]
    args = (args[0].clone().requires_grad_(), *args[1:])
    args, kwargs = prepare(*args, **kwargs)
    check_operator(torch.ops.bigmodel.linear_cross_entropy.default, (args, kwargs), backend)
    needs = [True, False, len(args) > 3 and args[3] is not None]
    if kwargs["reduction"] != "none":
        training = (args, {**kwargs, "needs": [True, False, False]})
        check_operator(torch.ops.bigmodel.linear_cross_entropy_training.default, training, backend)
    options = {k: v for k, v in kwargs.items() if k != "reduction"}
    logsumexp = torch.logsumexp(F.linear(X, W, B if needs[2] else None), 1)
    backward = ((torch.randn(7), X, *args[1:], logsumexp), {**options, "needs": needs})
    check_operator(torch.ops.bigmodel.linear_cross_entropy_backward.default, backward, backend)


def test_opcheck_of_the_scaling() -> None:
    check_operator(
        torch.ops.bigmodel.linear_cross_entropy_scaled.default,
        ((torch.tensor(2.0), [X.clone(), B.clone().bfloat16()], [X, W]), {}),
        "reference",
    )


@calls
def test_compiled_and_checkpointed(name: str) -> None:
    check_compiled(bk.linear_cross_entropy, CALLS[name])
    check_checkpointed(bk.linear_cross_entropy, CALLS[name])


def test_leading_dimensions() -> None:
    target = torch.randint(0, 5, (2, 3))
    x = torch.randn(2, 3, 4)
    losses = bk.linear_cross_entropy(x, W, target, reduction="none")
    assert losses.shape == (2, 3)
    torch.testing.assert_close(
        losses, F.cross_entropy((x @ W.t()).flatten(0, 1), target.flatten(), reduction="none").view(2, 3)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    weight = W.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = bk.linear_cross_entropy(X, weight, TARGET, B)
        loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, bk.linear_cross_entropy(X.to(dtype), W.to(dtype), TARGET, B.to(dtype)))
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_logits_and_three_products_a_chunk(reduction: str) -> None:
    rows, features, classes = 600, 16, 30_000
    x, weight = torch.randn(rows, features), torch.randn(classes, features)
    target = torch.randint(0, classes, (rows,))
    chunk = reference.chunk_rows(classes, 4, x.device)
    chunks = -(-rows // chunk)
    assert 1 < chunks < rows / 8
    with Sizes() as sizes:
        reference.run_training(x, weight, target, reduction=reduction, needs=[True, True, False])
    assert sizes.largest <= max(2 * chunk * classes, classes * features) < rows * classes / 2
    assert sizes.products == 3 * chunks


@pytest.mark.parametrize("needs", [[False, False, False], [True, False, False], [False, True, False]])
def test_a_gradient_that_is_not_needed_costs_no_product(needs: list[bool]) -> None:
    args = (X, W, TARGET)
    with Sizes() as sizes:
        reference.run_training(*args, needs=needs)
    assert sizes.products == 1 + sum(needs)
    with Sizes() as sizes:
        reference.run_backward(torch.ones(7), *args, None, torch.zeros(7), needs=needs)
    assert sizes.products == 1 + sum(needs)


def test_ignored_rows_are_not_computed() -> None:
    x = X.clone()
    x[TARGET == -100] = torch.nan
    x.requires_grad_()
    loss = bk.linear_cross_entropy(x, W, TARGET)
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()
    assert not x.grad[TARGET == -100].any()


def test_all_ignored_is_nan_as_in_torch() -> None:
    x = X.clone().requires_grad_()
    nothing = torch.full((7,), -100)
    assert bk.linear_cross_entropy(x, W, nothing).isnan()
    total = bk.linear_cross_entropy(x, W, nothing, reduction="sum")
    total.backward()
    assert total == 0 and x.grad is not None and not x.grad.any()


def test_under_vmap() -> None:
    x, target = torch.randn(3, 7, 4), torch.randint(0, 5, (3, 7))
    expected = torch.stack([bk.linear_cross_entropy(x[i], W, target[i]) for i in range(3)])
    mapped = torch.vmap(lambda x, t: bk.linear_cross_entropy(x, W, t))
    torch.testing.assert_close(mapped(x, target), expected)


def test_large_logits() -> None:
    x, weight = X * 1e4, W.clone().requires_grad_()
    loss = bk.linear_cross_entropy(x, weight, TARGET)
    torch.testing.assert_close(loss, F.cross_entropy(x @ W.t(), TARGET))
    loss.backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_a_training_step_learns() -> None:
    weight = torch.zeros(5, 4, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    target = (X[:, 0] > 0).long()
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = bk.linear_cross_entropy(X, weight, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3, losses


BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((X.int(), W, TARGET), {}, TypeError, "x has dtype torch.int32; allowed are"),
    ((X, W[:, :3], TARGET), {}, ValueError, r"weight has shape \(5, 3\); it must be \(classes, 4\)"),
    ((X, W[0], TARGET), {}, ValueError, r"weight has shape \(4,\)"),
    ((X, W[:0], TARGET), {}, ValueError, r"weight has shape \(0, 4\)"),
    ((X, W.half(), TARGET), {}, TypeError, "weight has dtype torch.float16"),
    ((X, W.to("meta"), TARGET), {}, ValueError, "weight is on meta"),
    ((X, W, TARGET, B[:4]), {}, ValueError, r"bias has shape \(4,\); it must be \(5,\)"),
    ((X, W, TARGET.int()), {}, TypeError, "target has dtype torch.int32; allowed is torch.int64"),
    ((X, W, TARGET[:6]), {}, ValueError, r"target has shape \(6,\); it must be"),
    ((X, W, TARGET + 1), {}, IndexError, "target holds 5; allowed are 0 to 4 and ignore_index=-100"),
    ((X, W, TARGET), {"ignore_index": -1}, IndexError, "target holds -100; allowed are 0 to 4"),
    ((X, W, TARGET), {"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5 is out of range"),
    ((X, W, TARGET), {"label_smoothing": float("nan")}, ValueError, "label_smoothing=nan is out of range"),
    ((X, W, TARGET), {"reduction": "max"}, ValueError, "reduction='max' is unknown; allowed are 'mean'"),
]


@pytest.mark.parametrize("args, kwargs, kind, message", BAD, ids=[b[3][:40] for b in BAD])
def test_bad_arguments(args: Any, kwargs: Any, kind: type[Exception], message: str) -> None:
    check_refused(bk.linear_cross_entropy, args, kwargs, kind, message)
    leaf = args[0].clone().requires_grad_() if args[0].is_floating_point() else args[0]
    check_refused(bk.linear_cross_entropy, (leaf, *args[1:]), kwargs, kind, message)
    check_refused(torch.ops.bigmodel.linear_cross_entropy, args, kwargs, kind, message)


def test_raw_operators_refuse() -> None:
    ops = torch.ops.bigmodel
    with pytest.raises(ValueError, match="reduction='none' is not allowed"):
        ops.linear_cross_entropy_training(X, W, TARGET, reduction="none", needs=[True, True, False])
    with pytest.raises(ValueError, match="needs holds 2 values; it must hold 3"):
        ops.linear_cross_entropy_training(X, W, TARGET, needs=[True, True])
    with pytest.raises(ValueError, match="asks for the gradient of bias, which is None"):
        ops.linear_cross_entropy_training(X, W, TARGET, needs=[True, True, True])
    with pytest.raises(ValueError, match=r"grad has shape \(3,\)"):
        ops.linear_cross_entropy_backward(
            torch.ones(3), X, W, TARGET, None, torch.zeros(7), needs=[True, True, False]
        )
    leaf = X.clone().requires_grad_()
    loss = ops.linear_cross_entropy_training(leaf, W, TARGET, needs=[False, True, False])[0]
    with pytest.raises(RuntimeError, match="x wants a gradient, which needs"):
        loss.backward()


def test_forced_backend_is_named() -> None:
    assert bk.explain("linear_cross_entropy", X.double(), W.double(), TARGET).chosen == "reference"
    with backends.use("reference"):
        out: Tensor = bk.linear_cross_entropy(X, W, TARGET)
    torch.testing.assert_close(out, F.cross_entropy(X @ W.t(), TARGET))
