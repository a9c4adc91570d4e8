"""The Triton embedding kernel against float64, in Triton's interpreter or on a GPU."""

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
from bigmodel_kernels.ops.embedding import reference
from bigmodel_kernels.ops.embedding import triton as kernel
from bigmodel_kernels.triton_runtime import INTERPRETED
from bigmodel_kernels.verify import compare, embedding_formula, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-12


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write shows; and the seed is fixed."""
    torch.manual_seed(0)
    with poisoned():
        yield


def _table(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(dtype)


def _ids(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, high, shape, device=DEVICE, dtype=dtype)


def _check(*arguments: Any) -> Tensor:
    assert kernel.supports(*arguments, EPS) is None
    out = kernel.run(*arguments, EPS)
    double = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    exact = reference.run(*double, EPS)
    assert out.shape == exact.shape and out.dtype == arguments[1].dtype and out.is_contiguous()
    verdict = compare(out, embedding_formula(*arguments, EPS), exact)
    assert verdict.ok, verdict
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 17, 127, 129, 384])
def test_bert(columns: int, dtype: torch.dtype) -> None:
    """Word + position (broadcast over the batch) + token type + LayerNorm, and with parts left out."""
    word, position, kinds = (_table(n, columns, dtype) for n in (50, 40, 2))
    weight, bias = _table(2, columns, dtype)
    ids, positions, types = _ids(50, 2, 33), torch.arange(33, device=DEVICE)[None], _ids(2, 2, 33)
    if columns > 1:  # a row of one element has no variance
        _check(ids, word, positions, position, types, kinds, weight, bias)
        _check(ids, word, positions, position, None, None, weight, None)
    _check(ids, word, positions, position, types, kinds, None, None)
    assert torch.equal(_check(ids, word, None, None, None, None, None, None), word[ids])


@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3, 5), (4, 1), (0,), (2, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    word, position = _table(50, 24), _table(40, 24)
    for dtype in (torch.int64, torch.int32):
        ids = _ids(50, *shape, dtype=dtype)
        _check(ids, word, _ids(40, *shape, dtype=dtype), position, None, None, None, None)
        if shape:
            _check(ids, word, _ids(40, shape[-1], dtype=dtype), position, None, None, None, None)


def test_strides() -> None:
    """Ids and tables of any strides."""
    word, position = _table(24, 50).t(), _table(80, 48)[::2, :24]
    ids, positions = _ids(50, 9, 4).t(), _ids(40, 4, 18)[:, ::2]
    _check(ids, word, positions, position, None, None, None, None)
    _check(ids, word, _ids(40, 4, 1), position, _ids(40, 1, 1), position, None, None)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_ids_outside_the_table(bad: int) -> None:
    """An IndexError names the argument and the id, and the id is never followed."""
    word, position, kinds = _table(50, 24), _table(50, 24), _table(50, 24)
    for at, name in enumerate(("input_ids", "position_ids", "token_type_ids")):
        ids = [_ids(50, 2, 9) for _ in range(3)]
        ids[at][1, 4] = bad
        with pytest.raises(IndexError, match=rf"^{name}\b.*{bad}\b"):
            kernel.run(ids[0], word, ids[1], position, ids[2], kinds, None, None, EPS)


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    ids, word = _ids(50, 2, 9), _table(50, 24)
    assert bk.explain("embedding", ids, word).chosen == "triton"
    assert torch.equal(bk.embedding(ids, word), word[ids])


def test_reasons() -> None:
    ids, word = _ids(50, 2, 9), _table(50, 24)
    nothing: list[Any] = [None] * 6
    assert "float64" in str(kernel.supports(ids, word.double(), *nothing, EPS))
    wide = word[:1, :1].expand(1, 32_769)
    assert "32769" in str(kernel.supports(ids, wide, *nothing, EPS))
