"""The Triton embedding kernel against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gradient_checks import check_against_formula
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
from bigmodel_kernels.ops import philox
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


SEED = 2**50 + 3


def _check_both_ways(
    ids: Tensor, word: Tensor, positions: Any, position: Any, types: Any, kinds: Any, weight: Any, bias: Any,
    p: float = 0.0, padding_idx: int = -1,
) -> None:  # fmt: skip
    """Output and all gradients, by the numerics rule."""
    names = ("word", "position", "kinds", "weight", "bias")
    tensors: dict[str, Any] = dict(zip(names, (word, position, kinds, weight, bias), strict=True))
    shape = (*ids.shape, word.shape[1])

    def formula(word: Tensor, position: Any, kinds: Any, weight: Any, bias: Any) -> Tensor:
        if padding_idx >= 0:  # the row as it is, without its gradient
            word = word.index_copy(
                0, torch.tensor([padding_idx], device=DEVICE), word[[padding_idx]].detach()
            )
        y = embedding_formula(ids, word, positions, position, types, kinds, weight, bias, EPS)
        if p:
            keep = philox.keep_elements(torch.tensor(SEED), p, ids.numel(), shape[-1], y.dtype, y.device)
            y = y * keep.view(shape)
        return y

    seed = torch.tensor(SEED, device=DEVICE) if p else None
    arguments = (ids, word, positions, position, types, kinds, weight, bias)
    out = kernel.run(*arguments, EPS, seed, dropout_p=p, padding_idx=padding_idx)
    upstream = _table(ids.numel(), shape[-1], word.dtype).view(shape)
    assert kernel.supports_backward(upstream, *arguments, seed) is None
    options: dict[str, Any] = {"norm_eps": EPS, "dropout_p": p, "padding_idx": padding_idx}
    needs = [t is not None for t in tensors.values()]
    grads = kernel.run_backward(upstream, *arguments, seed, **options, needs=needs)
    again = kernel.run_backward(upstream, *arguments, seed, **options, needs=needs)
    assert all(map(torch.equal, grads, again))
    check_against_formula(formula, tensors, upstream, {"out": out, **dict(zip(names, grads, strict=True))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    """Ids that repeat within a block of sorted tokens, over a few blocks (token types) and hardly (words)."""
    word, position, kinds = (_table(n, 50, dtype) for n in (70, 30, 2))
    weight, bias = _table(2, 50, dtype)
    ids, positions, types = _ids(70, 3, 30), torch.arange(30, device=DEVICE)[None], _ids(2, 3, 30)
    _check_both_ways(
        ids, word, positions, position, types, kinds, weight, bias, p=0.25, padding_idx=int(ids[0, 0])
    )
    _check_both_ways(ids, word, positions, position, None, None, None, None)


def test_gradients_of_long_runs() -> None:
    """One id for more blocks than the second kernel takes at a time; a run that ends a block."""
    long = kernel.BLOCK * 19
    ids = torch.cat([torch.full((long,), 3), torch.full((kernel.BLOCK,), 1), torch.tensor([0, 3, 5, 5])])
    ids = ids.to(DEVICE, torch.int32)
    grad = torch.randn(len(ids), 130, device=DEVICE)
    table = torch.empty(7, 130, device=DEVICE)
    exact = torch.zeros(7, 130, device=DEVICE, dtype=torch.float64).index_add_(0, ids.long(), grad.double())
    torch.testing.assert_close(kernel.table_gradient(grad, ids, table).double(), exact, rtol=1e-5, atol=1e-4)
    exact[3] = 0
    skipped = kernel.table_gradient(grad, ids, table, padding_idx=3)
    torch.testing.assert_close(skipped.double(), exact, rtol=1e-5, atol=1e-4)


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradients_of_any_runs(lengths: list[int]) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
    ids = ids[torch.randperm(len(ids), device=DEVICE)]
    grad = torch.randn(len(ids), 16, device=DEVICE)
    out = kernel.table_gradient(grad, ids, torch.empty(len(lengths) + 1, 16, device=DEVICE))
    exact = torch.zeros(len(lengths) + 1, 16, device=DEVICE, dtype=torch.float64)
    exact.index_add_(0, ids, grad.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


def test_only_what_is_needed() -> None:
    word, position = _table(20, 24), _table(9, 24)
    weight, bias = _table(2, 24)
    arguments = (_table(9, 24), _ids(20, 9), word, torch.arange(9, device=DEVICE), position, None, None)
    every = kernel.run_backward(*arguments, weight, bias, norm_eps=EPS, needs=[True, True, False, True, True])
    for i in (0, 1, 3, 4):
        needs = [i == j for j in range(5)]
        one = kernel.run_backward(*arguments, weight, bias, norm_eps=EPS, needs=needs)
        assert torch.equal(one[i], every[i]) and all(t.shape == (0,) for j, t in enumerate(one) if j != i)
    empty = (arguments[0][:0], arguments[1][:0], word, None, None, None, None)
    grads = kernel.run_backward(*empty, weight, None, norm_eps=EPS, needs=[True, False, False, True, False])
    assert (grads[0] == 0).all() and (grads[3] == 0).all() and grads[0].shape == word.shape


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
