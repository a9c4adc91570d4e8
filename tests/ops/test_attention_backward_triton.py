"""The gradient of attention in Triton against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

from attention_eager import eager_attention
from triton_dtypes import DTYPES, QUICK_DTYPES

from bigmodel_kernels.ops.attention import triton as kernel
from bigmodel_kernels.ops.attention import triton_backward
from bigmodel_kernels.ops.attention.triton_backward import BackwardTile, BackwardTiles, backward_tiles
from bigmodel_kernels.ops.side_by_side import heads_lie_side_by_side
from bigmodel_kernels.triton_runtime import AMPERE, BLACKWELL, HOPPER, INTERPRETED, MI300
from bigmodel_kernels.verify import compare, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = ("query", "key", "value", "bias", "sinks")
#: For features whose arithmetic is the same in both.
ONE_DTYPE = [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write shows; and the seed is fixed."""
    torch.manual_seed(0)
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and unequal tiles: every kind of edge at sizes that the interpreter runs quickly."""
    tiles = BackwardTiles(BackwardTile(16, 32, 1, 1), BackwardTile(32, 16, 1, 1), BackwardTile(16, 16, 1, 1))

    def choose(head_dim: int, itemsize: int, *_: Any) -> BackwardTiles:
        return tiles._replace(chunk=32 if itemsize == 4 else 256)  # as on NVIDIA

    monkeypatch.setattr(triton_backward, "backward_tiles", choose)
    monkeypatch.setattr(kernel, "attention_tile", lambda *_: kernel.AttentionTile(32, 32, 1, 1))


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _dense(
    rows: int, keys: int, dim: int = 16, dtype: torch.dtype = torch.float32, batch: int = 1, heads: int = 2,
    kv_heads: int | None = None,
) -> list[Tensor]:  # fmt: skip
    kv_heads = heads if kv_heads is None else kv_heads
    return [
        _tensor(batch, heads, rows, dim, dtype=dtype),
        _tensor(batch, kv_heads, keys, dim, dtype=dtype),
        _tensor(batch, kv_heads, keys, dim, dtype=dtype),
    ]


def _gradients(
    dtype: torch.dtype | None,
    inputs: dict[str, Any],
    grads: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """By autograd through the formula, in a dtype, or each tensor in its own."""
    leaves = {
        name: t.detach().to(dtype or t.dtype).requires_grad_() if name in NAMES else t
        for name, t in inputs.items()
    }
    results = eager_attention(**leaves, **options)
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
    wanted = [name for name in NAMES if name in leaves]
    found = torch.autograd.grad(
        [r for r, _ in pairs], [leaves[n] for n in wanted], [g for _, g in pairs], allow_unused=True
    )
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(wanted, found, strict=True)}


def _check(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Runs the kernels and holds every gradient to the numerics rule."""
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {name: arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], Tensor)}
    options = {"softmax_scale": query.shape[-1] ** -0.5, **arguments}
    with_sums = options.pop("with_sums", True)
    window = options.get("window_left", -1), options.get("window_right", -1)
    few = query.shape[-2] == 1 or key.shape[-2] == 1 or (min(window) >= 0 and sum(window) < 8)
    out, logsumexp = kernel.run(**inputs, **options)
    grads = (torch.randn_like(out), torch.randn_like(logsumexp) if with_sums else None)
    assert kernel.supports_backward(*grads, out=out, logsumexp=logsumexp, **inputs, **options) is None
    results = kernel.run_backward(
        *grads, out=out, logsumexp=logsumexp, **inputs, **options,
        bias_requires_grad="bias" in inputs, sinks_require_grad="sinks" in inputs,
    )  # fmt: skip
    if with_sums:  # nothing comes from the gradient of a logsumexp of -inf
        grads = (grads[0], grads[1].masked_fill(logsumexp == -torch.inf, 0.0))
    exact = _gradients(torch.float64, inputs, grads, options)
    eager = _gradients(None, inputs, grads, options)
    found = dict(zip(NAMES, results, strict=True))
    for name in NAMES:
        if name in inputs:
            assert found[name].shape == inputs[name].shape and found[name].dtype == inputs[name].dtype, name
            if (few or found[name].numel() <= 4) and query.dtype == torch.float32:
                # One key has a probability of exactly 1, with which the formula makes no error at all; one
                # row, or a gradient of a few numbers, is too little for a mean: chance would decide.
                torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-5, atol=2e-6)
                continue
            verdict = compare(found[name], eager[name], exact[name], "gradient")
            assert verdict.ok, (name, verdict)
        else:
            assert found[name].shape == (0,)
    return found


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 17, 32, 80])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    _check(*_dense(20, 37, dim, dtype))


@pytest.mark.parametrize("dim", [128, pytest.param(192, marks=pytest.mark.slow), 256])
def test_large_head_dims(dim: int) -> None:
    for dtype in DTYPES:
        _check(*_dense(17, 40, dim, dtype, heads=1), is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 70), (70, 1), (33, 65), (64, 32)])
def test_lengths(rows: int, keys: int, is_causal: bool) -> None:
    """Also causal with more queries than keys, where the first rows see nothing and have no gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        found = _check(*_dense(rows, keys, dtype=dtype), is_causal=is_causal)
        blind = max(0, rows - keys) if is_causal else 0
        assert (found["query"][:, :, :blind] == 0).all()


def test_no_keys_and_no_queries() -> None:
    found = _check(*_dense(5, 0), bias=_tensor(1, 1, 1, 1))
    assert (found["query"] == 0).all() and (found["bias"] == 0).all()
    found = _check(*_dense(0, 5), sinks=_tensor(2))
    assert (found["key"] == 0).all() and (found["sinks"] == 0).all()
    _check(*_dense(3, 5, batch=0))


@pytest.mark.parametrize("window", [(0, 0), (5, -1), (-1, 7), (20, 3), (40, 40), (1000, 1000)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows(window: tuple[int, int], is_causal: bool) -> None:
    left, right = window
    for rows, keys in ((37, 50), (50, 37)):
        q, k, v = _dense(rows, keys, heads=1)
        _check(q, k, v, is_causal=is_causal, window_left=left, window_right=right)


@pytest.mark.parametrize("dtype", ONE_DTYPE, ids=str)
def test_key_padding(dtype: torch.dtype) -> None:
    q, k, v = _dense(20, 77, dtype=dtype, batch=4, heads=1)
    padding = torch.ones(4, 77, dtype=torch.bool, device=DEVICE)
    padding[0, 40:] = False
    padding[1, :70] = False
    padding[2] = torch.rand(77, device=DEVICE) < 0.5
    padding[3] = False
    found = _check(q, k, v, key_padding_mask=padding, is_causal=True)
    assert (found["query"][3] == 0).all() and (found["key"][3] == 0).all()
    assert (found["value"][1, :, :70] == 0).all()


@pytest.mark.parametrize(
    "kv_heads", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(6, marks=pytest.mark.slow)]
)
def test_grouped_heads(kv_heads: int) -> None:
    for dtype in (torch.float32, torch.float16):
        _check(*_dense(19, 35, 16, dtype, heads=6, kv_heads=kv_heads), is_causal=True)


@pytest.mark.parametrize("dtype", ONE_DTYPE, ids=str)
def test_softcap_and_scales(dtype: torch.dtype) -> None:
    q, k, v = _dense(20, 37, dtype=dtype)
    _check(q, k, v, softcap=50.0)
    _check(4 * q, 4 * k, v, softcap=2.0, is_causal=True)
    for scale in (1.0, -0.3, 0.0):
        _check(q, k, v, softmax_scale=scale)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    q, k, v = _dense(20, 37, dtype=dtype)
    _check(q, k, v, softmax_scale=5.0)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 20, 37),
        (2, 1, 1, 37),
        (1, 2, 20, 1),
        (),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 2, 20, 37), (2, 1, 20, 37), (20, 37), (37,))),
    ],
    ids=str,
)
def test_bias(shape: tuple[int, ...]) -> None:
    q, k, v = _dense(20, 37, batch=2, kv_heads=1)
    _check(q, k, v, bias=_tensor(*shape))
    if shape[-1:] != (1,):
        # A bias shared by all keys cancels in the softmax. Its gradient is what the rounding of the output
        # leaves, which the float32 formula that a float32 bias makes has not.
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        found = _check(q, k, v, bias=_tensor(*shape), is_causal=True, window_left=20, softcap=4.0)
        assert found["bias"].dtype == torch.float32


def test_bias_of_minus_infinity() -> None:
    q, k, v = _dense(20, 37)
    bias = torch.where(torch.rand(1, 1, 20, 37, device=DEVICE) < 0.5, 0.0, -torch.inf)
    bias[:, :, 7] = -torch.inf
    padding = torch.rand(1, 37, device=DEVICE) < 0.5
    found = _check(q, k, v, bias=bias, key_padding_mask=padding)
    assert (found["query"][:, :, 7] == 0).all() and (found["bias"][bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("dtype", ONE_DTYPE, ids=str)
def test_alibi(dtype: torch.dtype) -> None:
    q, k, v = _dense(20, 37, 16, dtype, batch=2, kv_heads=1)
    slopes = torch.tensor([0.5, 0.0625], device=DEVICE)
    _check(q, k, v, alibi_slopes=slopes, is_causal=True)
    twice = slopes * torch.tensor([[1.0], [3.0]], device=DEVICE)
    _check(q, k, v, alibi_slopes=twice, softcap=5.0, bias=_tensor(20, 37, dtype=dtype))


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_sinks(dtype: torch.dtype) -> None:
    q, k, v = _dense(25, 20, 16, dtype, heads=4, kv_heads=2)
    sinks = torch.tensor([-torch.inf, -3.0, 2.0, 6.0], device=DEVICE)
    found = _check(q, k, v, sinks=sinks, is_causal=True)
    assert found["sinks"][0] == 0
    _check(q, k, v, sinks=_tensor(4, dtype=dtype), softcap=3.0, window_left=5, with_sums=False)


@pytest.mark.parametrize("dtype", ONE_DTYPE, ids=str)
def test_dropout(dtype: torch.dtype) -> None:
    """The elements that fell in the forward."""
    seed = torch.tensor(2**61 + 12345, device=DEVICE)
    q, k, v = _dense(20, 37, dtype=dtype, kv_heads=1)
    options = {"dropout_seed": seed, "dropout_p": 0.3, "is_causal": True}
    _check(q, k, v, **options, bias=_tensor(20, 37, dtype=dtype))
    _check(q, k, v, **options, window_left=20, sinks=_tensor(2))


def test_strides() -> None:
    """Slices of a fused projection, heads repeated by stride 0, rows with gaps, and any gradient."""
    qkv = _tensor(2, 45, 3, 4, 16)
    _check(*(part.transpose(1, 2) for part in qkv.unbind(2)), is_causal=True)
    q, k, v = _dense(45, 45, 16, heads=4, kv_heads=1)
    _check(q, k.expand(1, 4, 45, 16), v.expand(1, 4, 45, 16))
    _check(q.flip(2)[:, :, ::2], k[:, :, ::3], v[:, :, ::3])
    q, k, v = _dense(20, 30)
    out, logsumexp = kernel.run(q, k, v, softmax_scale=0.3)
    ones = torch.ones(1, 2, 20, 1, device=DEVICE)
    strided = [g.expand(1, 2, 20, 16) for g in (ones, ones[:, :1, :1])]
    results = [
        kernel.run_backward(g, ones[..., 0].expand(1, 2, 20), q, k, v, out, logsumexp, softmax_scale=0.3)
        for g in (strided[0].contiguous(), strided[1].contiguous())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_side_by_side(kv_heads: int, packed: bool) -> None:
    """The same bits, in the parts of one tensor."""
    query, key, value = _dense(33, 33, heads=4, kv_heads=kv_heads)
    lengths: dict[str, Any] = {}
    if packed:
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        lengths = {"max_seqlen_q": 20, "max_seqlen_k": 20}
        lengths |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), _packed([13, 20]))
    options = {"softmax_scale": 0.3, **lengths}
    grad = torch.randn_like(query)
    args = (grad, None, query, key, value, *kernel.run(query, key, value, **options))
    apart = kernel.run_backward(*args, **options)[:3]
    beside = kernel.run_backward(*args, **options, side_by_side=True)[:3]
    assert heads_lie_side_by_side(beside) and not heads_lie_side_by_side(apart)
    assert all(map(torch.equal, apart, beside))


def _packed(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.bfloat16),
        *(
            pytest.param(options, dtype, marks=pytest.mark.slow)
            for options in ({}, {"is_causal": True, "window_left": 20})
            for dtype in DTYPES
            if options or dtype != torch.bfloat16
        ),
    ],
    ids=str,
)
def test_packed(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Sequences without queries, without keys and without both; with every feature that a packed call has."""
    rows, keys = [17, 0, 33, 5, 0, 1, 40], [17, 9, 20, 0, 0, 50, 41]
    q = _tensor(sum(rows), 3, 4, 16, dtype=dtype)[:, 1]
    kv = _tensor(sum(keys), 2, 2, 16, dtype=dtype)
    lengths = {"cu_seqlens_q": _packed(rows), "cu_seqlens_k": _packed(keys), "max_seqlen_q": 64}
    _check(q, kv[:, 0], kv[:, 1], **lengths, max_seqlen_k=50, **options)
    extras = {
        "alibi_slopes": torch.rand(len(rows), 4, device=DEVICE),
        "sinks": _tensor(4),
        "dropout_seed": torch.tensor(77, device=DEVICE),
        "dropout_p": 0.4,
    }
    _check(q, kv[:, 0], kv[:, 1], **lengths, max_seqlen_k=50, **options, **extras)


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(2, 40),
    keys=st.integers(2, 40),
    kv_heads=st.sampled_from([1, 2]),
    left=st.integers(-1, 60),
    right=st.integers(-1, 60),
    padded=st.booleans(),
    bias=st.sampled_from([None, (1, 2), (1, 1)]),
    softcap=st.sampled_from([0.0, 3.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.25]),
)
def test_any_combination(
    rows: int, keys: int, kv_heads: int, left: int, right: int, padded: bool, bias: tuple[int, int] | None,
    softcap: float, alibi: bool, sinks: bool, dropout_p: float,
) -> None:  # fmt: skip
    q, k, v = _dense(rows, keys, 8, kv_heads=kv_heads)
    extras: dict[str, Tensor] = {}
    if padded:
        extras["key_padding_mask"] = torch.rand(1, keys, device=DEVICE) < 0.7
    if bias is not None:
        extras["bias"] = _tensor(*bias, rows, keys)
    if alibi:
        extras["alibi_slopes"] = torch.rand(2, device=DEVICE)
    if sinks:
        extras["sinks"] = _tensor(2)
    if dropout_p:
        extras["dropout_seed"] = torch.tensor(rows * 1000 + keys, device=DEVICE)
    _check(q, k, v, **extras, window_left=left, window_right=right, softcap=softcap, dropout_p=dropout_p)


def test_twice_the_same_bits() -> None:
    q, k, v = _dense(40, 50, 16, torch.bfloat16, kv_heads=1)
    bias, sinks = _tensor(1, 1, 1, 50), _tensor(2)
    out, logsumexp = kernel.run(q, k, v, bias=bias, sinks=sinks, softmax_scale=0.25)
    grad = torch.randn_like(out)
    first, second = (
        kernel.run_backward(
            grad, None, q, k, v, out, logsumexp, bias=bias, sinks=sinks, softmax_scale=0.25,
            bias_requires_grad=True, sinks_require_grad=True, deterministic=deterministic,
        )
        for deterministic in (True, False)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "target", [AMPERE, HOPPER, BLACKWELL, MI300], ids=["sm_80", "sm_90", "sm_100", "gfx942"]
)
def test_tiles(target: Any) -> None:
    """Every head_dim has tiles, whose accumulators take no more than half of a thread's registers."""
    registers = 512 if target.warp == 64 else 255
    for dim in (1, 16, 32, 64, 80, 128, 192, 256):
        width = max(16, 1 << (dim - 1).bit_length())
        for itemsize in (2, 4):
            for heavy in (False, True):
                keys, rows, bias, chunk = backward_tiles(dim, itemsize, target, heavy)
                assert chunk >= 16 and (chunk >= width or width % chunk == 0)
                for tile in (keys, rows, bias):
                    assert tile.tile_m >= 16 and tile.tile_n >= 16 and tile.num_warps in (4, 8)
                kept = (2 * keys.tile_n * width / keys.num_warps, rows.tile_m * width / rows.num_warps)
                # Blackwell's accumulators are in a memory of their own.
                assert target.tensor_memory or max(kept) / target.warp <= registers / 2 + 1
