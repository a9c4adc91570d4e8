"""Linear and cross-entropy in Triton against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_checks import check_against_formula
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
from bigmodel_kernels.ops.cross_entropy import triton as kernel
from bigmodel_kernels.triton_runtime import INTERPRETED
from bigmodel_kernels.verify import poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write shows; and the seed is fixed."""
    torch.manual_seed(0)
    with poisoned():
        yield


def _case(rows: int, features: int, classes: int, dtype: torch.dtype, ignored: float = 0.2) -> list[Tensor]:
    x = torch.randn(rows, features, device=DEVICE).to(dtype)
    weight = torch.randn(classes, features, device=DEVICE).to(dtype) / features**0.5
    target = torch.randint(0, classes, (rows,), device=DEVICE)
    target[torch.rand(rows, device=DEVICE) < ignored] = -100
    return [x, weight, target, torch.randn(classes, device=DEVICE).to(dtype)]


def _check(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str, **options: Any
) -> None:
    """Loss and all gradients, by the numerics rule, and the logsumexp."""
    dtype = x.dtype

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(x, weight, bias)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        return F.cross_entropy(logits, target, reduction=reduction, **options).to(x.dtype)

    needs = [True, True, bias is not None]
    arguments = (x, weight, target, bias)
    loss, logsumexp = kernel.run(*arguments, reduction=reduction, **options)
    upstream = torch.ones_like(loss, dtype=dtype)
    if reduction == "none":
        upstream = torch.randn(loss.shape, device=DEVICE).to(dtype)
        grads = kernel.run_backward(upstream.float(), *arguments, logsumexp, needs=needs, **options)
    else:
        again, sums, *grads = kernel.run_training(*arguments, reduction=reduction, needs=needs, **options)
        assert torch.equal(again, loss) and torch.equal(sums, logsumexp)
    assert loss.dtype == logsumexp.dtype == torch.float32
    results = dict(zip(("x", "weight", "bias"), grads, strict=True))
    if reduction == "none":
        results["out"] = loss.to(dtype)
    else:  # one number, to which eager may happen to be as near as it likes
        exact = formula(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-6)
    check_against_formula(formula, {"x": x, "weight": weight, "bias": bias}, upstream, results)
    logits = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    exact = torch.where(target == options.get("ignore_index", -100), 0.0, logits.logsumexp(1))
    torch.testing.assert_close(logsumexp.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("reduction", "dtype"),
    [
        *(("mean", dtype) for dtype in DTYPES),
        *((reduction, dtype) for reduction in ("sum", "none") for dtype in (torch.float32, torch.bfloat16)),
        *(pytest.param(reduction, torch.float16, marks=pytest.mark.slow) for reduction in ("sum", "none")),
    ],
    ids=str,
)
def test_reductions_and_chunks(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, and several with a last one that is shorter."""
    _check(*_case(8, 24, 40, dtype), reduction)
    monkeypatch.setattr(kernel, "chunk_rows", lambda *_: 5)
    _check(*_case(8, 24, 40, dtype), reduction, label_smoothing=0.2)
    _check(*_case(8, 24, 40, dtype, ignored=0.0)[:3], None, reduction)


@pytest.mark.parametrize("classes", [1, 33, 150])
def test_classes(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also rows of logits longer than a tile."""
    monkeypatch.setattr(kernel, "TILE", 64)
    _check(*_case(8, 16, classes, torch.float32), "none", label_smoothing=0.1)


def test_strides_and_another_ignore_index() -> None:
    x, weight, target, bias = _case(12, 24, 40, torch.float32, ignored=0.0)
    target[::3] = 7
    _check(x.t().contiguous().t(), weight.t().contiguous().t(), target, bias, "mean", ignore_index=7)


def test_large_logits() -> None:
    x, weight, target, _ = _case(5, 16, 40, torch.float32)
    _check(200 * x, weight, target, None, "mean")


def test_nothing_counts() -> None:
    """As in torch: a mean over nothing is NaN, a sum is 0, and gradients are 0."""
    x, weight, target, bias = _case(4, 8, 9, torch.float32, ignored=2.0)
    for arguments in ((x, weight, target, bias), (x[:0], weight, target[:0], bias)):
        for reduction in ("mean", "sum"):
            loss, logsumexp, *grads = kernel.run_training(*arguments, reduction=reduction, needs=[True] * 3)
            assert loss.isnan() if reduction == "mean" else loss == 0
            assert (logsumexp == 0).all() and all((g == 0).all() for g in grads)


def test_only_what_is_needed() -> None:
    arguments = _case(9, 16, 33, torch.bfloat16)
    every = kernel.run_training(*arguments, needs=[True] * 3)[2:]
    for i in range(3):
        one = kernel.run_training(*arguments, needs=[i == j for j in range(3)])[2:]
        assert torch.equal(one[i], every[i]) and all(t.shape == (0,) for j, t in enumerate(one) if j != i)


def test_chunks_hold_little() -> None:
    for classes in (100, 50_257, 256_000):
        for itemsize in (2, 4):
            rows = kernel.chunk_rows(classes, itemsize)
            assert rows >= kernel.LEAST_ROWS and rows % kernel.LEAST_ROWS == 0
            assert rows == kernel.LEAST_ROWS or rows * classes * 4 <= kernel.CHUNK_BYTES


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    x, weight, target, bias = _case(9, 16, 33, torch.float32)
    assert bk.explain("linear_cross_entropy", x, weight, target, bias).chosen == "triton"
    x.requires_grad_()
    loss = bk.linear_cross_entropy(x, weight, target, bias)
    loss.backward()
    expected, _, dx, *_ = kernel.run_training(x.detach(), weight, target, bias, needs=[True, False, False])
    assert torch.equal(loss, expected) and torch.equal(x.grad, dx)


def test_reasons() -> None:
    assert "float64" in str(kernel.supports(torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)))
