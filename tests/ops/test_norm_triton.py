"""The Triton LayerNorm kernel against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
from bigmodel_kernels.ops import philox, reduce_triton
from bigmodel_kernels.ops.norm import reference
from bigmodel_kernels.ops.norm import triton as kernel
from bigmodel_kernels.triton_runtime import INTERPRETED
from bigmodel_kernels.verify import compare, layer_norm_formula, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write shows; and the seed is fixed."""
    torch.manual_seed(0)
    with poisoned():
        yield


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    assert kernel.supports(x, weight, bias, eps, residual) is None
    out = kernel.run(x, weight, bias, eps, residual)
    double = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    assert double[0] is not None
    exact = reference.run(double[0], double[1], double[2], eps, double[3])
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    if x.dtype == torch.float32 and x.numel() == x.shape[-1]:
        # All errors of one row share the rounding of one deviation: no mean for the rule to compare.
        torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=5e-7)
        return out
    verdict = compare(out, layer_norm_formula(x, weight, bias, eps, residual), exact)
    assert verdict.ok, verdict
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 17, 127, 129, 384, 1000, 5000])
@pytest.mark.parametrize("rows", [1, 17])
def test_sizes(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = (_tensor(*s, dtype=dtype) for s in ((rows, columns), (columns,), (columns,)))
    _check(x, weight, bias)
    _check(x, weight, bias, _tensor(rows, columns, dtype=dtype))


def test_parameters_and_shapes() -> None:
    x, weight, bias = _tensor(2, 3, 5, 96), _tensor(96), _tensor(96)
    for w, b in ((None, None), (weight, None), (None, bias), (weight, bias)):
        _check(x, w, b)
    _check(_tensor(96), weight, bias)
    assert kernel.run(_tensor(0, 96), weight, bias, 1e-5).shape == (0, 96)
    assert kernel.run(_tensor(3, 0), None, None, 1e-5).shape == (3, 0)
    _check(x, weight, bias, eps=0.5)


def test_strides() -> None:
    x, weight = _tensor(7, 4, 64), _tensor(128)[::2]
    _check(x.transpose(0, 1), weight, None, x.flip(0).transpose(0, 1))
    _check(x[:, 1], weight, weight, x[:, 2])
    _check(_tensor(9, 128)[:, ::2], weight, None, _tensor(64, 9).t())
    _check(_tensor(64).expand(5, 64), weight, None, x[:5, 0])


def test_mean_far_from_zero_and_constant_rows() -> None:
    """The variance must not cancel; a constant row has none and gives the bias."""
    _check(_tensor(5, 768) + 1000, None, None)
    bias = _tensor(64)
    out = kernel.run(torch.full((3, 64), 7.25, device=DEVICE), None, bias, 1e-5)
    assert torch.equal(out, bias.expand(3, 64))


SEED = 2**61 + 12_345


def _formula(
    kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, p: float,
    offset: float, eps: float,
) -> Tensor:  # fmt: skip
    """By plain PyTorch, in the dtype of x."""
    rows = x.numel() // x.shape[-1]
    if p:
        keep = philox.keep_elements(torch.tensor(SEED), p, rows, x.shape[-1], x.dtype, x.device)
        x = x * keep.view(x.shape)
    total = x if residual is None else x + residual
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps)
    scale = None if weight is None else weight + offset
    return torch.nn.functional.rms_norm(total, x.shape[-1:], scale, eps)


def _check_both_ways(
    kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None, residual: Tensor | None = None,
    p: float = 0.0, offset: float = 0.0, eps: float = 1e-5,
) -> None:  # fmt: skip
    """Output and all gradients, by the numerics rule."""
    seed = torch.tensor(SEED, device=DEVICE) if p else None
    arguments = (x, weight, bias, residual)
    upstream = _tensor(*x.shape, dtype=x.dtype)
    results: list[list[Tensor | None]] = []
    for dtype in (torch.float64, x.dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in arguments]
        assert leaves[0] is not None
        y = _formula(kind, leaves[0], *leaves[1:], p, offset, eps)
        y.backward(upstream.to(dtype))
        results.append([y.detach(), *(None if t is None else t.grad for t in leaves)])
    options = {"dropout_p": p} if kind == "layer_norm" else {"dropout_p": p, "weight_offset": offset}
    if kind == "layer_norm":
        out = kernel.run(x, weight, bias, eps, residual, seed, **options)
    else:
        out = kernel.run_rms_norm(x, weight, eps, residual, seed, **options)
    order = (x, residual, weight, bias)
    assert kernel.supports_backward(upstream, x, weight, bias, residual, seed) is None
    dx, dresidual, dweight, dbias = kernel.run_backward(
        upstream, x, weight, bias, residual, seed, kind=kind, eps=eps, dropout_p=p, weight_offset=offset,
        needs=[t is not None for t in order],
    )  # fmt: skip
    exact, eager = results
    for name, ours, reference_64, plain in zip(
        ("out", "dx", "dweight", "dbias", "dresidual"), (out, dx, dweight, dbias, dresidual), exact, eager,
        strict=True,
    ):  # fmt: skip
        if reference_64 is None or plain is None:
            assert ours.shape == (0,)
            continue
        assert ours.dtype == x.dtype and ours.is_contiguous()
        verdict = compare(ours, plain, reference_64, "forward" if name == "out" else "gradient")
        assert verdict.ok, (name, verdict)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(2, 33), (17, 129), (70, 96), (5, 1000)])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients(kind: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, residual = _tensor(rows, columns, dtype=dtype), _tensor(rows, columns, dtype=dtype)
    weight, bias = _tensor(columns, dtype=dtype), _tensor(columns, dtype=dtype)
    if kind == "layer_norm":
        _check_both_ways(kind, x, weight, bias)
        _check_both_ways(kind, x, weight, bias, residual, p=0.3)
    else:
        _check_both_ways(kind, x, weight)
        _check_both_ways(kind, x, weight, None, residual, p=0.3, offset=1.0)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients_without_parameters_and_with_strides(kind: str) -> None:
    _check_both_ways(kind, _tensor(2, 3, 40), None)
    _check_both_ways(kind, _tensor(40, 6).t(), _tensor(80)[::2], None, _tensor(6, 80)[:, ::2], p=0.5)


def test_many_tiles_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program walks over several tiles, of several rows or of one wide one."""
    target = kernel.target_of(_tensor(1))._replace(processors=2)
    monkeypatch.setattr(kernel, "target_of", lambda _: target)
    _check_both_ways("layer_norm", _tensor(150, 300), _tensor(300), _tensor(300), _tensor(150, 300))
    _check_both_ways("layer_norm", _tensor(6, 8000), _tensor(8000), _tensor(8000))
    _check_both_ways("rms_norm", _tensor(6, 3000), _tensor(3000), p=0.1)


def test_only_what_is_needed() -> None:
    x, weight, bias, grad = _tensor(9, 64), _tensor(64), _tensor(64), _tensor(9, 64)
    options = {"kind": "layer_norm", "eps": 1e-5}
    every = kernel.run_backward(grad, x, weight, bias, x, needs=[True] * 4, **options)
    for i in range(4):
        one = kernel.run_backward(grad, x, weight, bias, x, needs=[i == j for j in range(4)], **options)
        assert torch.equal(one[i], every[i]) and all(t.shape == (0,) for j, t in enumerate(one) if j != i)
    empty = kernel.run_backward(grad[:0], x[:0], weight, bias, needs=[True, False, True, True], **options)
    assert empty[0].shape == (0, 64) and (empty[2] == 0).all() and (empty[3] == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_of_a_sum_that_is_there(p: float) -> None:
    """As of dropout(x) + residual, and with the column sums of the gradient of x."""
    x, residual, grad = (_tensor(40, 96) for _ in range(3))
    weight, bias = _tensor(96), _tensor(96)
    seed = torch.tensor(3, device=DEVICE) if p else None
    keep = philox.keep_elements(seed, p, 40, 96, x.dtype, x.device) if p else 1.0
    options: dict[str, Any] = {"kind": "layer_norm", "eps": 1e-5, "dropout_p": p}
    expected = kernel.run_backward(grad, x, weight, bias, residual, seed, **options, needs=[True] * 4)
    total = x * keep + residual
    got = kernel.run_backward(grad, total, weight, bias, None, seed, **options, summed=True, needs=[True] * 5)
    for mine, theirs in zip(got, (*expected, expected[0].sum(0)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    (*_, none) = kernel.run_backward(
        grad[:0], total[:0], weight, bias, None, seed, **options, summed=True, needs=[True] * 5
    )
    assert none.tolist() == [0.0] * 96


def test_dropout_of_everything() -> None:
    seed = torch.tensor(3, device=DEVICE)
    x, residual = _tensor(5, 64), _tensor(5, 64)
    out = kernel.run(x, None, None, 1e-5, residual, seed, dropout_p=1.0)
    assert torch.equal(out, kernel.run(residual, None, None, 1e-5))


def test_two_stage_sums() -> None:
    for rows, columns in ((1, 1), (33, 17), (1000, 300), (70, 1030)):
        x = _tensor(rows, columns + 3)[:, 3:]
        exact = x.double().sum(0)
        sums = reduce_triton.column_sums(x, torch.empty(columns, device=DEVICE))
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-4)
        assert torch.equal(sums, reduce_triton.column_sums(x, torch.empty(columns, device=DEVICE)))
    assert (reduce_triton.column_sums(x[:0], torch.empty(columns, device=DEVICE)) == 0).all()
    parts = _tensor(3, 5, 7)
    scale = torch.tensor(0.5, device=DEVICE)
    out = reduce_triton.sum_parts(parts, torch.empty(5, 7, device=DEVICE), scale)
    torch.testing.assert_close(out, 0.5 * parts.sum(0))


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    x, weight = _tensor(9, 24), _tensor(24)
    assert bk.explain("layer_norm", x, weight, None, 1e-5).chosen == "triton"
    assert torch.equal(bk.layer_norm(x, weight, None, 1e-5), kernel.run(x, weight, None, 1e-5))


def test_tiles_and_reasons() -> None:
    for columns in (1, 384, 768, 4096, 5000, kernel.MAX_COLUMNS):
        tile = kernel.row_tile(1000, columns)
        back = kernel.backward_row_tile(1000, columns)
        assert back.tile_columns == tile.tile_columns
        assert tile.tile_columns >= columns and tile.tile_rows * tile.tile_columns <= 64 * 32 * tile.num_warps
    wide = torch.empty(1, 1, device=DEVICE).expand(1, kernel.MAX_COLUMNS + 1)
    assert str(kernel.MAX_COLUMNS) in str(kernel.supports(wide, None, None, 1e-5))
    assert "int64" in str(kernel.supports(wide.long(), None, None, 1e-5))
    assert "8192" in str(kernel.supports_backward(wide, wide, None, None))
