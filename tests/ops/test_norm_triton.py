"""The Triton LayerNorm kernel against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
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


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    x, weight = _tensor(9, 24), _tensor(24)
    assert bk.explain("layer_norm", x, weight, None, 1e-5).chosen == "triton"
    assert torch.equal(bk.layer_norm(x, weight, None, 1e-5), kernel.run(x, weight, None, 1e-5))


def test_tiles_and_reasons() -> None:
    for columns in (1, 384, 768, 4096, 5000, kernel.MAX_COLUMNS):
        tile = kernel.row_tile(1000, columns)
        assert tile.tile_columns >= columns and tile.tile_rows * tile.tile_columns <= 64 * 32 * tile.num_warps
    wide = torch.empty(1, 1, device=DEVICE).expand(1, kernel.MAX_COLUMNS + 1)
    assert str(kernel.MAX_COLUMNS) in str(kernel.supports(wide, None, None, 1e-5))
    assert "int64" in str(kernel.supports(wide.long(), None, None, 1e-5))
