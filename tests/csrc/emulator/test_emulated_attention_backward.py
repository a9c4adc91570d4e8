"""The CUDA attention backward, run in the emulator, against float64 by the rule of `numerics`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_attention import make
from torch import Tensor

from bigmodel_kernels.ops.attention import prepare
from bigmodel_kernels.ops.side_by_side import heads_lie_side_by_side
from bigmodel_kernels.verify import attention_formula, compare, evaluate

pytestmark = pytest.mark.usefixtures("library", "architecture")
DTYPES = [torch.bfloat16, torch.float16]


def emulated(grads: tuple[Tensor, Tensor | None], args: Any, options: dict[str, Any], **flags: Any) -> Any:
    ops = torch.ops.bigmodel_emulator
    out, lse = ops.cuda_attention(*args, **options)
    result = ops.cuda_attention_backward(*grads, *args[:3], out, lse, *args[3:], **options, **flags)
    dq, dk, dv, dbias, delta = result
    sinks = args[9]
    if sinks is not None:
        rows = (1,) if delta.dim() == 2 else (0, 2)
        dsinks = -(torch.exp(sinks.float().view(-1, 1) - lse) * delta).sum(rows)
        return dq, dk, dv, dbias, dsinks
    return dq, dk, dv, dbias, None


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_lse: bool = False,
    deterministic: bool = False,
    **call: Any,
) -> None:
    """Holds the gradients to the numerics rule."""
    args, options = prepare(query, key, value, **call)
    given = {"query": query, "key": key, "value": value, "dropout_seed": args[7], **call}
    rows = query.shape[:3] if query.dim() == 4 else (query.shape[1], query.shape[0])
    grads = (torch.randn_like(query), torch.randn(rows) if grad_lse else None)
    flags = {"bias_requires_grad": "bias" in call, "deterministic": deterministic}
    results = emulated(grads, args, options, **flags)
    found = dict(zip(("query", "key", "value", "bias", "sinks"), results, strict=True))
    if "bias" in call:
        shape, dbias = call["bias"].shape, found["bias"]
        found["bias"] = dbias.sum_to_size(shape) if dbias.dim() == len(shape) else dbias.view(shape)
    upstream = (grads[0], torch.zeros(rows) if grads[1] is None else grads[1])
    _, eager = evaluate(attention_formula, (), given, None, upstream)
    _, exact = evaluate(attention_formula, (), given, torch.float64, upstream)
    # One key has a probability of exactly 1, with which the formula makes no error at all. A bias that is the
    # same for all keys has no gradient; what is left of it is the rounding of out.
    keys = key.shape[-2]
    chances = dict.fromkeys(found, 1e-6 if keys == 1 else 0.0)
    if "bias" in call and call["bias"].shape[-1] == 1:
        chances["bias"] = 1e-2
    for name, gradient in found.items():
        if name in given:
            verdict = compare(gradient, eager[name], exact[name], "gradient", chance=chances[name])
            assert verdict.ok, (name, verdict)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        *((dim, torch.bfloat16) for dim in (8, 32, 64, 96, 128, 256)),
        *((dim, torch.float16) for dim in (32, 128)),
        *(pytest.param(dim, torch.float16, marks=pytest.mark.slow) for dim in (8, 64, 96, 192, 256)),
        pytest.param(192, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(*make(1, 2, 2, 70, 77, dim, dtype), is_causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 150), (17, 127), (129, 129), (200, 33)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(queries: int, keys: int, causal: bool) -> None:
    check(*make(2, 2, 1, queries, keys, 64, torch.bfloat16), is_causal=causal)


@pytest.mark.parametrize(
    "call",
    [
        {"window": (16, None)},
        {"window": (None, 9)},
        {"window": (40, 3), "softcap": 5.0},
        {"softcap": 20.0, "is_causal": True},
        {"is_causal": True, "grad_lse": True},
        {"dropout_p": 0.25},
    ],
    ids=str,
)
def test_options(call: dict[str, Any]) -> None:
    check(*make(1, 2, 1, 100, 140, 64, torch.float16), **call)


@pytest.mark.parametrize(
    ("shift", "window"),
    [
        *[(shift, (None, 0)) for shift in (-62, -2, -1, 0, 1, 2, 62, 63)],
        *[(0, (left, None)) for left in (62, 63)],
        *[(shift, (None, 62)) for shift in (-1, 0, 1)],
        (3, (61, 5)),
    ],
)
def test_every_pair_of_a_mask(shift: int, window: tuple[int | None, int | None]) -> None:
    """At the edges of tiles: q = 0 makes all P of a row alike, dO = 1 makes dV = P^T, and K = 1 dQ = dS."""
    queries, keys, both = 128, 128 + shift, min(128, 128 + shift)
    query, value = torch.zeros(1, 1, queries, 128).half(), torch.randn(1, 1, keys, 128).half()
    key, grad = (torch.eye(n, 128)[None, None].half() for n in (keys, queries))
    args, options = prepare(query, key, value, window=window)
    dq, _, dv, *_ = emulated((grad, None), args, options)
    left, right = (1000 if side is None else side for side in window)
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - shift
    visible = (distance >= -left) & (distance <= right)
    assert torch.equal(dv[0, 0].t() != 0, visible)
    assert (dq[0, 0, :, :both][~visible[:, :both]] == 0).all() and (dq != 0).any()


def test_key_padding_alibi_and_sinks() -> None:
    mask = torch.rand(3, 90) < 0.6
    mask[1] = False
    tensors = make(3, 2, 2, 33, 90, 64, torch.bfloat16)
    check(*tensors, key_padding_mask=mask)
    check(*tensors, alibi_slopes=torch.rand(2), sinks=torch.randn(2), is_causal=True)


@pytest.mark.parametrize("size", [(2, 4, 50, 60), (4, 1, 60), (50, 1), (2, 1, 50, 60)], ids=str)
def test_bias(size: tuple[int, ...]) -> None:
    check(*make(2, 4, 2, 50, 60, 32, torch.float16), bias=torch.randn(size))


def test_masks_of_the_lowest_number() -> None:
    """Times log2(e) it is beyond float32: as -inf, for a query all of whose keys have it too."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(33, 40)
    bias[:, 0] = lowest
    tensors = make(1, 2, 1, 33, 40, 32, torch.bfloat16)
    check(*tensors, bias=bias)
    bias[1] = lowest
    args, options = prepare(*tensors, bias=bias)
    gradients = emulated((torch.randn_like(tensors[0]), None), args, options, bias_requires_grad=True)[:4]
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, 1] == 0).all() and (gradients[3][..., 1, :] == 0).all()


def test_packed_sequences() -> None:
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 5, 5, 140, 150], [0, 70, 71, 200, 200]))
    query, key, value = (torch.randn(n, 2, 64).to(torch.bfloat16) for n in (150, 200, 200))
    check(query, key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, is_causal=True)


@pytest.mark.parametrize("dim", [64, 192])
def test_a_packed_sequence_does_not_see_its_neighbour(dim: int) -> None:
    """Its tiles reach into the next sequence, where nothing is finite: 0 times that would be NaN."""
    query, grad = (torch.randn(200, 2, dim).to(torch.bfloat16) for _ in range(2))
    key, value = (torch.randn(180, 1, dim).to(torch.bfloat16) for _ in range(2))
    for tensor, length in ((query, 90), (grad, 90), (key, 75), (value, 75)):
        tensor[length:] = float("inf")
        tensor[length + 1 :] = float("nan")
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 90, 200], [0, 75, 180]))
    args, options = prepare(query, key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    both = emulated((grad, None), args, options)
    alone = (query[:90], key[:75], value[:75])
    args, options = prepare(*alone, cu_seqlens_q=cu_q[:2], cu_seqlens_k=cu_k[:2])
    for got, expected, length in zip(
        both[:3], emulated((grad[:90], None), args, options)[:3], (90, 75, 75), strict=True
    ):
        assert expected.isfinite().all() and torch.equal(got[:length], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "queries", "keys"),
    [(32, 400, 290), (32, 130, 900), (128, 330, 290), (128, 70, 700), (192, 330, 290), (256, 330, 290)],
)
@pytest.mark.parametrize("call", [{}, {"dropout_p": 0.25, "softcap": 30.0}], ids=str)
def test_many_tiles(dim: int, queries: int, keys: int, call: dict[str, Any]) -> None:
    """More than there are stages for, twice over."""
    check(*make(1, 2, 1, queries, keys, dim, torch.bfloat16), window=(800, 250), **call)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_see(queries: int, keys: int) -> None:
    args, options = prepare(*make(1, 2, 2, queries, keys, 64, torch.float16))
    for grad in emulated((torch.randn_like(args[0]), None), args, options)[:3]:
        assert (grad == 0).all()


@pytest.mark.parametrize("dim", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_the_bits_do_not_depend_on_the_order_of_threads(dim: int) -> None:
    tensors = make(1, 2, 1, 100, 130, dim, torch.bfloat16)
    args, options = prepare(*tensors, is_causal=True, bias=torch.randn(100, 130))
    grads = (torch.randn_like(args[0]), None)
    results = []
    for seed in range(4):
        torch.ops.bigmodel_emulator.set_seed(seed)
        results.append(emulated(grads, args, options, bias_requires_grad=True, deterministic=True)[:4])
    torch.ops.bigmodel_emulator.set_seed(0)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_side_by_side(packed: bool) -> None:
    """The same bits, in the parts of one tensor; with fewer heads of keys."""
    query, key, value = make(1, 4, 2, 70, 70, 64, torch.float16)
    lengths: dict[str, Any] = {}
    if packed:
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        cu_seqlens = torch.tensor([0, 30, 70], dtype=torch.int32)
        lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    args, options = prepare(query, key, value, **lengths)
    grads = (torch.randn_like(query), None)
    apart, beside = (emulated(grads, args, options, side_by_side=flag)[:3] for flag in (False, True))
    assert heads_lie_side_by_side(beside) and not heads_lie_side_by_side(apart)
    assert all(map(torch.equal, apart, beside))


@pytest.fixture
def hopper(architecture: int) -> None:
    if architecture != 90:
        pytest.skip("one form only")


SLOW = pytest.mark.slow


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dim", "dtype", "call", "deterministic"),
    [
        (64, torch.bfloat16, {}, True),
        (128, torch.float16, {"is_causal": True}, True),
        (128, torch.bfloat16, {"window": (100, 20)}, False),
        *[
            pytest.param(dim, dtype, call, deterministic, marks=SLOW)
            for dim, dtype in (
                (32, torch.bfloat16),
                (64, torch.float16),
                (80, torch.float16),
                (128, torch.bfloat16),
            )
            for call in ({}, {"is_causal": True}, {"window": (150, 40)})
            for deterministic in (False, True)
        ],
    ],
    ids=str,
)
def test_hoppers_two_forms(dim: int, dtype: torch.dtype, call: dict[str, Any], deterministic: bool) -> None:
    """One adds dQ up over the blocks of keys, here three, and one takes two passes and does not add."""
    check(*make(1, 2, 1, 70, 270, dim, dtype), deterministic=deterministic, **call)


@pytest.mark.usefixtures("hopper")
def test_who_adds_first_moves_the_last_bits_of_dq_alone() -> None:
    """Keys far from 0 make parts of dQ that cancel (the gradients of a row of logits add up to 0)."""
    query, key, value = make(1, 1, 1, 20, 300, 64, torch.float16)
    args, options = prepare(query, key + 8, value)
    grads = (torch.randn_like(query), None)
    for deterministic in (True, False):
        results = []
        for seed in range(3):
            torch.ops.bigmodel_emulator.set_seed(seed)
            results.append(emulated(grads, args, options, deterministic=deterministic)[:3])
        torch.ops.bigmodel_emulator.set_seed(0)
        first, *others = results
        moved = [any(not torch.equal(other[i], first[i]) for other in others) for i in range(3)]
        assert moved == [not deterministic, False, False]
        assert all(torch.allclose(other[0], first[0], rtol=1e-2, atol=1e-4) for other in others)


def test_queries_that_see_nothing_get_zeros() -> None:
    """Keys of one block, so that Hopper's writes dQ at once: of every query, though no key be there."""
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 5, 145, 150], [0, 30, 30, 100]))
    args, options = prepare(
        *(torch.randn(n, 2, 64).half() for n in (150, 100, 100)), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
    )
    before = torch.full((150, 2, 64), float("nan"), dtype=torch.float16)  # what the allocator gives next
    del before
    dq, dk, dv, *_ = emulated((torch.randn_like(args[0]), None), args, options)
    assert (dq[5:145] == 0).all() and (dq[:5] != 0).any() and (dq[145:] != 0).any()
    assert dk.isfinite().all() and dv.isfinite().all()


def test_bad_input_is_refused() -> None:
    args, options = prepare(*make(1, 2, 2, 8, 8, 64, torch.float16))
    backward = torch.ops.bigmodel_emulator.cuda_attention_backward
    out, lse = torch.ops.bigmodel_emulator.cuda_attention(*args, **options)
    with pytest.raises(RuntimeError, match=r"grad_out: shape \(1, 2, 7, 64\) must be query's"):
        backward(out[:, :, :7], None, *args[:3], out, lse, *args[3:], **options)
    with pytest.raises(RuntimeError, match=r"logsumexp: shape \(1, 2, 7\) must be"):
        backward(out, None, *args[:3], out, lse[:, :, :7].contiguous(), *args[3:], **options)
    args, options = prepare(*make(1, 2, 2, 8, 16, 64, torch.float16))
    out, lse = torch.ops.bigmodel_emulator.cuda_attention(*args, **options)
    with pytest.raises(RuntimeError, match="side_by_side: needs a key for each query"):
        backward(out, None, *args[:3], out, lse, *args[3:], **options, side_by_side=True)
