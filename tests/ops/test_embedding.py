"""Embedding: against float64, its gradients, its arguments."""

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
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.ops.embedding import prepare
from bigmodel_kernels.ops.philox import keep_elements

IDS, WORD = torch.tensor([[1, 5, 1], [0, 2, 6]]), torch.randn(7, 4)
POSITIONS, POSITION = torch.arange(3)[None], torch.randn(5, 4)
TYPES, TYPE = torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.randn(2, 4)
W, B = torch.randn(4), torch.randn(4)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "all": ((IDS, WORD, POSITIONS, POSITION, TYPES, TYPE, W, B, 1e-5), {}),
    "word": ((IDS, WORD), {}),
    "no norm, int32": ((IDS.int(), WORD, POSITIONS[0].int(), POSITION), {}),
    "no norm bias": (
        (IDS, WORD),
        {"token_type_ids": TYPES[:1, :1], "token_type_weight": TYPE, "norm_weight": W},
    ),
}
calls = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("case", list(verify.cases("embedding")), ids=str)
def test_against_float64(case: verify.Case, cpu_backend: str) -> None:
    check_case(case, cpu_backend)


@given(
    shape=st.lists(st.integers(0, 6), max_size=3),
    hidden=st.integers(3, 100),
    tables=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    broadcast=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_any_shape(
    backend: str, shape: list[int], hidden: int, tables: tuple[bool, bool, bool], broadcast: bool, seed: int
) -> None:
    if backend == "native" and (reason := _native.reason()):
        pytest.skip(reason)
    torch.manual_seed(seed)
    position, types, norm = tables
    options: dict[str, Any] = {}
    other = [1 if broadcast else n for n in shape]
    if position:
        options |= {"position_ids": torch.randint(0, 9, other), "position_weight": torch.randn(9, hidden)}
    if types:
        options |= {"token_type_ids": torch.randint(0, 2, other), "token_type_weight": torch.randn(2, hidden)}
    if norm:
        options |= {"norm_weight": torch.randn(hidden), "norm_bias": torch.randn(hidden), "norm_eps": 1e-3}
    ids, word = torch.randint(0, 20, shape), torch.randn(20, hidden)
    with backends.use(backend):
        out = bk.embedding(ids, word, **options)
    double = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    expected = verify.embedding_formula(ids, word.double(), **double)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)


@calls
def test_gradients(name: str) -> None:
    check_gradients(bk.embedding, CALLS[name], second=True)
    check_each_gradient_alone(bk.embedding, CALLS[name])
    dropped = (CALLS[name][0], {**CALLS[name][1], "dropout_p": 0.4})
    function = with_seed(torch.ops.bigmodel.embedding, prepare)
    check_gradients(function, dropped)
    check_each_gradient_alone(function, dropped)


@pytest.mark.parametrize("p", [0.0, 0.4])
@calls
def test_opcheck_of_the_gradient(name: str, p: float, cpu_backend: str) -> None:
    args, kwargs = CALLS[name]
    raw, options = prepare(*args, **kwargs, dropout_p=p, padding_idx=1)
    *tensors, eps = raw[:9]
    needs = [tensors[i] is not None for i in (1, 3, 5, 6, 7)]
    grad = torch.randn(*IDS.shape, 4)
    call = ((grad, *tensors, *raw[9:]), {**options, "norm_eps": eps, "needs": needs})
    require(cpu_backend, "embedding_backward", *call)
    check_operator(torch.ops.bigmodel.embedding_backward.default, call, cpu_backend)
    with backends.use(cpu_backend):
        for i in range(5):
            alone = {**call[1], "needs": [i == j and n for j, n in enumerate(needs)]}
            results = torch.ops.bigmodel.embedding_backward(*call[0], **alone)
            assert [r.numel() > 0 for r in results] == alone["needs"]


def test_padding_row_gets_no_gradient(cpu_backend: str) -> None:
    word = WORD.clone().requires_grad_()
    expected = F.embedding(IDS, word, padding_idx=1)
    for index in (1, -6):
        with backends.use(cpu_backend):
            out = bk.embedding(IDS, word, padding_idx=index)
            assert torch.equal(out, expected)
            gradient = torch.autograd.grad(out.square().sum(), word)[0]
        assert not gradient[1].any()
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected.square().sum(), word, retain_graph=True)[0]
        )
    for index in (7, -8):
        with pytest.raises(ValueError, match=f"padding_idx={index} is out of range; allowed are -7 to 6"):
            bk.embedding(IDS, word, padding_idx=index)
    with pytest.raises(ValueError, match="padding_idx=7 is out of range"):
        torch.ops.bigmodel.embedding(IDS, word, None, None, None, None, None, None, 1e-5, padding_idx=7)


def test_dropout_is_that_of_elements_behind_the_norm() -> None:
    args, options = prepare(IDS, WORD.double(), norm_weight=W.double(), dropout_p=0.3)
    keep = keep_elements(args[9], 0.3, 6, 4, torch.float64, "cpu").view(2, 3, 4)
    out = torch.ops.bigmodel.embedding(*args, **options)
    torch.testing.assert_close(out, F.layer_norm(WORD.double()[IDS], (4,), W.double(), eps=1e-12) * keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_equal_ids_are_summed_in_float32(dtype: torch.dtype, cpu_backend: str) -> None:
    """4096 gradients of 1 for one row: a half sum would stop at 256 or 2048."""
    word = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    with backends.use(cpu_backend):
        bk.embedding(torch.ones(4096, dtype=torch.int64), word).sum().backward()
    assert word.grad is not None and torch.equal(word.grad[1], torch.full((4,), 4096.0, dtype=dtype))


def test_under_vmap() -> None:
    expected = torch.stack([bk.embedding(ids, WORD, norm_weight=W) for ids in IDS])
    mapped = torch.vmap(lambda ids, word: bk.embedding(ids, word, norm_weight=W), in_dims=(0, None))
    torch.testing.assert_close(mapped(IDS, WORD), expected)
    tables = torch.randn(2, 7, 4)
    expected = torch.stack([bk.embedding(ids, t) for ids, t in zip(IDS, tables, strict=True)])
    torch.testing.assert_close(torch.vmap(bk.embedding)(IDS, tables), expected)


@calls
def test_opcheck(name: str, cpu_backend: str) -> None:
    args, kwargs = CALLS[name]
    args, _ = prepare(*args, **kwargs)
    args = (args[0], args[1].clone().requires_grad_(), *args[2:])
    check_operator(torch.ops.bigmodel.embedding.default, (args, {}), cpu_backend)


@calls
def test_compiled_and_checkpointed(name: str) -> None:
    check_compiled(bk.embedding, CALLS[name])
    check_checkpointed(bk.embedding, CALLS[name])


def test_autocast_leaves_it_alone(cpu_backend: str) -> None:
    args, _ = CALLS["all"]
    with backends.use(cpu_backend):
        expected = bk.embedding(*args)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(bk.embedding(*args), expected)


def test_inputs_of_any_strides(cpu_backend: str) -> None:
    ids, table = torch.randint(0, 7, (3, 2)).t(), torch.randn(7, 8)[:, ::2]
    with backends.use(cpu_backend):
        out = bk.embedding(ids, table)
    assert torch.equal(out, F.embedding(ids, table)) and out.is_contiguous()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_ids": IDS.float()}, TypeError, "input_ids has dtype torch.float32; allowed are torch.int64"),
    ({"word_weight": WORD.int()}, TypeError, "word_weight has dtype torch.int32"),
    ({"word_weight": WORD[0]}, ValueError, r"word_weight has shape \(4,\)"),
    ({"input_ids": IDS + 1}, IndexError, "input_ids holds 7; allowed are 0 to 6"),
    ({"input_ids": IDS - 1}, IndexError, "input_ids holds -1; allowed are 0 to 6"),
    ({"input_ids": IDS.to("meta")}, ValueError, "input_ids is on meta|meta"),
    ({"position_ids": POSITIONS + 3}, IndexError, "position_ids holds 5; allowed are 0 to 4"),
    ({"token_type_ids": TYPES - 1}, IndexError, "token_type_ids holds -1; allowed are 0 to 1"),
    ({"position_ids": None}, ValueError, "position_ids is None and position_weight is given"),
    ({"token_type_weight": None}, ValueError, "token_type_weight is None and token_type_ids is given"),
    ({"position_ids": torch.arange(2)}, ValueError, r"position_ids has shape \(2,\); it must broadcast"),
    ({"token_type_ids": TYPES[None]}, ValueError, r"token_type_ids has shape \(1, 2, 3\)"),
    ({"position_weight": POSITION[:, :3]}, ValueError, r"position_weight has shape \(5, 3\)"),
    ({"position_weight": POSITION.half()}, TypeError, "position_weight has dtype torch.float16"),
    ({"norm_weight": W[:3]}, ValueError, r"norm_weight has shape \(3,\); it must be \(4,\)"),
    ({"norm_weight": None}, ValueError, "norm_bias is given and norm_weight is None"),
    ({"norm_eps": -1.0}, ValueError, "norm_eps=-1.0 is out of range"),
]


@pytest.mark.parametrize("changes, kind, message", BAD, ids=[b[2][:40] for b in BAD])
def test_bad_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    names = (
        "input_ids",
        "word_weight",
        "position_ids",
        "position_weight",
        "token_type_ids",
        "token_type_weight",
    )
    values = dict(zip((*names, "norm_weight", "norm_bias", "norm_eps"), CALLS["all"][0], strict=True))
    values |= changes
    check_refused(bk.embedding, (), values, kind, message)
    check_refused(torch.ops.bigmodel.embedding, tuple(values.values()), {}, kind, message)
