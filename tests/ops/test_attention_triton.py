"""The Triton attention kernel against float64, in Triton's interpreter or on a GPU."""

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

import bigmodel_kernels as bk
from bigmodel_kernels.ops.attention import reference
from bigmodel_kernels.ops.attention import triton as kernel
from bigmodel_kernels.triton_runtime import AMPERE, BLACKWELL, HOPPER, INTERPRETED, MI300
from bigmodel_kernels.verify import compare, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write shows; and the seed is fixed."""
    torch.manual_seed(0)
    with poisoned():
        yield


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _dense(
    rows: int, keys: int, dim: int = 32, dtype: torch.dtype = torch.float32, batch: int = 1, heads: int = 2,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kv_heads = heads if kv_heads is None else kv_heads
    query = _tensor(batch, heads, rows, dim, dtype=dtype)
    return (
        query,
        _tensor(batch, kv_heads, keys, dim, dtype=dtype),
        _tensor(batch, kv_heads, keys, dim, dtype=dtype),
    )


def _agree(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, exact: Tensor, options: dict[str, Any]
) -> None:
    """The numerics rule: `out` is about as near to `exact` as plain PyTorch in the same dtype is."""
    eager, _ = eager_attention(query, key, value, **options)
    verdict = compare(out, eager, exact)
    assert verdict.ok, verdict


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _check(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Runs the kernel on a dense call and holds it to the numerics rule."""
    options.setdefault("softmax_scale", query.shape[-1] ** -0.5)
    assert kernel.supports(query, key, value, **options) is None
    out, logsumexp = kernel.run(query, key, value, **options)
    exact, exact_lse = eager_attention(
        *map(_double, (query, key, value)), **{k: _double(v) for k, v in options.items()}
    )
    assert out.shape == query.shape and out.dtype == query.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert (
        logsumexp.shape == query.shape[:3] and logsumexp.dtype == torch.float32 and logsumexp.is_contiguous()
    )
    _agree(out, query, key, value, exact, options)
    torch.testing.assert_close(logsumexp.double(), exact_lse, rtol=1e-5, atol=2e-5)
    return out, logsumexp


def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 x 16 tiles: every kind of edge at sizes that the interpreter runs quickly."""
    monkeypatch.setattr(kernel, "attention_tile", lambda *_: kernel.AttentionTile(16, 16, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 17, 32, 64, 80])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    _check(*_dense(33, 70, dim, dtype))


@pytest.mark.parametrize("dim", [128, 192, 256])
def test_large_head_dims(dim: int) -> None:
    for dtype in DTYPES:
        _check(*_dense(17, 65, dim, dtype, heads=1), is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys"), [(1, 1), (1, 129), (17, 17), (127, 129), (129, 127), (129, 1), (200, 31), (64, 128)]
)
def test_lengths(rows: int, keys: int, is_causal: bool) -> None:
    """Also causal with more queries than keys, where the first rows see nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        out, logsumexp = _check(*_dense(rows, keys, dtype=dtype), is_causal=is_causal)
        blind = max(0, rows - keys) if is_causal else 0
        assert (out[:, :, :blind] == 0).all() and (logsumexp[:, :, :blind] == -torch.inf).all()


def test_no_keys_and_no_queries() -> None:
    out, logsumexp = _check(*_dense(5, 0))
    assert (out == 0).all() and (logsumexp == -torch.inf).all()
    out, logsumexp = kernel.run(*_dense(0, 5), softmax_scale=1.0)
    assert out.shape == (1, 2, 0, 32) and logsumexp.shape == (1, 2, 0)
    out, _ = kernel.run(*_dense(3, 5, batch=0), softmax_scale=1.0)
    assert out.shape == (0, 2, 3, 32)


@pytest.mark.parametrize(
    "window",
    [
        *((5, -1), (-1, 7), (20, 3)),
        *(pytest.param(w, marks=pytest.mark.slow) for w in ((0, 0), (40, 40), (1000, 1000))),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows(window: tuple[int, int], is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _small_tiles(monkeypatch)
    left, right = window
    for dtype in DTYPES:
        q, k, v = _dense(37, 61, 16, dtype, heads=2, kv_heads=1)
        _check(q, k, v, is_causal=is_causal, window_left=left, window_right=right)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 50),
    keys=st.integers(0, 50),
    left=st.integers(-1, 60),
    right=st.integers(-1, 60),
    is_causal=st.booleans(),
    padded=st.booleans(),
)
def test_any_mask(
    rows: int,
    keys: int,
    left: int,
    right: int,
    is_causal: bool,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _small_tiles(monkeypatch)
    q, k, v = _dense(rows, keys, 8, heads=1)
    padding = torch.rand(1, keys, device=DEVICE) < 0.7 if padded else None
    _check(q, k, v, is_causal=is_causal, window_left=left, window_right=right, key_padding_mask=padding)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_key_padding(dtype: torch.dtype) -> None:
    """Padding on either side, holes, and a sequence without any visible key."""
    q, k, v = _dense(35, 77, dtype=dtype, batch=4)
    padding = torch.ones(4, 77, dtype=torch.bool, device=DEVICE)
    padding[0, 40:] = False
    padding[1, :70] = False
    padding[2] = torch.rand(77, device=DEVICE) < 0.5
    padding[3] = False
    out, logsumexp = _check(q, k, v, key_padding_mask=padding)
    assert (out[3] == 0).all() and (logsumexp[3] == -torch.inf).all()
    _check(q, k, v, key_padding_mask=padding, is_causal=True, window_left=30)
    strided = torch.zeros(77, 4, 2, dtype=torch.bool, device=DEVICE)
    strided[:, :, 1] = padding.t()
    _check(q, k, v, key_padding_mask=strided[:, :, 1].t())


@pytest.mark.parametrize(
    "shape",
    [
        *((2, 4, 33, 70), (2, 1, 1, 70), (1, 4, 33, 1), ()),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 4, 33, 70), (2, 1, 33, 70), (33, 70), (70,))),
    ],
)
def test_bias(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float16):
        q, k, v = _dense(33, 70, 16, dtype, batch=2, heads=4, kv_heads=2)
        _check(q, k, v, bias=_tensor(*shape, dtype=dtype))
    _check(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=_tensor(*shape), is_causal=True
    )  # float32 beside bfloat16


def test_bias_in_any_layout_and_with_minus_infinity() -> None:
    q, k, v = _dense(33, 70, 16, heads=4)
    bias = _tensor(1, 70, 33, 4).permute(0, 3, 2, 1)  # T5's (1, Sq, Sk, H), permuted
    _check(q, k, v, bias=bias, window_left=20)
    bias = torch.where(torch.rand(1, 1, 33, 70, device=DEVICE) < 0.5, 0.0, -torch.inf)
    bias[:, :, 7] = -torch.inf
    out, logsumexp = _check(q, k, v, bias=bias)
    assert (out[:, :, 7] == 0).all() and (logsumexp[:, :, 7] == -torch.inf).all()


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_softcap(dtype: torch.dtype) -> None:
    q, k, v = _dense(33, 70, dtype=dtype)
    _check(q, k, v, softcap=50.0)  # nearly linear: the logits are small beside the cap
    _check(4 * q, 4 * k, v, softcap=2.0, is_causal=True)
    _check(q, k, v, softcap=5.0, bias=_tensor(33, 70, dtype=dtype), window_left=40)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_scales(dtype: torch.dtype) -> None:
    """T5 and OPT scale by 1; a negative scale reverses the order; 0 is the mean; 30 is nearly one-hot."""
    q, k, v = _dense(20, 40, dtype=dtype)
    for scale in (1.0, -0.3, 0.0, 30.0):
        _check(q, k, v, softmax_scale=scale)


def test_large_logits() -> None:
    """Logits of 10^5: the softmax is one-hot and the output a row of value."""
    q, k, v = _dense(20, 40)
    out, _ = kernel.run(300 * q, 300 * k, v, softmax_scale=1.0)
    best = (q @ k.transpose(-1, -2)).argmax(-1, keepdim=True).expand_as(q)
    torch.testing.assert_close(out, v.gather(2, best), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(kv_heads: int) -> None:
    for dtype in (torch.float32, torch.float16):
        _check(*_dense(19, 45, 16, dtype, batch=2, heads=6, kv_heads=kv_heads), is_causal=True)


def test_strides() -> None:
    """Slices of a fused projection, (S, B, H, D) memory, heads repeated by stride 0, and rows with gaps."""
    qkv = _tensor(2, 45, 3, 4, 16)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    _check(q, k, v, is_causal=True)
    qkv = _tensor(45, 2, 4, 3 * 20)[..., :48]
    _check(*(part.permute(1, 2, 0, 3) for part in qkv.split(16, -1)))
    q, k, v = _dense(45, 45, 16, heads=4, kv_heads=1)
    _check(q, k.expand(1, 4, 45, 16), v.expand(1, 4, 45, 16))
    _check(q.flip(2)[:, :, ::2], k[:, :, ::3], v[:, :, ::3])


def _packed(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window_left": 9, "window_right": 4}, {"is_causal": True, "window_left": 20}],
    ids=str,
)
def test_packed(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Each sequence as if alone; sequences without queries, without keys and without both."""
    rows, keys = [17, 0, 33, 5, 0, 1, 40], [17, 9, 20, 0, 0, 50, 41]
    q = _tensor(sum(rows), 3, 4, 16, dtype=dtype)[:, 1]
    kv = _tensor(sum(keys), 2, 2, 16, dtype=dtype)
    cu_q, cu_k = _packed(rows), _packed(keys)
    options = {"softmax_scale": 0.3, "max_seqlen_q": 64, "max_seqlen_k": 50, **options}
    out, logsumexp = kernel.run(q, kv[:, 0], kv[:, 1], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    assert out.shape == q.shape and out.is_contiguous() and logsumexp.shape == (4, sum(rows))
    alone = {name: value for name, value in options.items() if "seqlen" not in name}
    for i in range(len(rows)):
        row, key = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        parts = [part.transpose(0, 1)[None] for part in (q[row], kv[key, 0], kv[key, 1])]
        exact, exact_lse = reference.run(*map(_double, parts), **alone)
        _agree(out[row].transpose(0, 1)[None], *parts, exact, alone)
        torch.testing.assert_close(logsumexp[:, row].double(), exact_lse[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_alibi(dtype: torch.dtype) -> None:
    """Slopes of a head, of a head of a sequence, beside a window and more queries than keys."""
    q, k, v = _dense(33, 70, 16, dtype, batch=2, heads=4, kv_heads=2)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE)
    _check(q, k, v, alibi_slopes=slopes, is_causal=True)
    _check(q, k, v, alibi_slopes=slopes * torch.tensor([[1.0], [3.0]], device=DEVICE), softcap=5.0)
    _check(*_dense(40, 20, 16, dtype, heads=4), alibi_slopes=slopes, window_left=9, window_right=30)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_sinks(dtype: torch.dtype) -> None:
    """A row that sees no key has the sink alone: zeros, and the sink as logsumexp."""
    q, k, v = _dense(40, 20, 16, dtype, heads=4, kv_heads=2)
    sinks = torch.tensor([-torch.inf, -3.0, 2.0, 60.0], device=DEVICE)
    out, logsumexp = _check(q, k, v, sinks=sinks, is_causal=True)
    assert (out[:, :, :20] == 0).all()
    torch.testing.assert_close(logsumexp[0, :, 0], sinks)
    _check(q, k, v, sinks=sinks.to(dtype), softcap=3.0, window_left=5)


def test_dropout_is_that_of_the_reference() -> None:
    """The same elements fall, so that the backward can repeat them; the logsumexp is that without dropout."""
    seed = torch.tensor(2**61 + 12345, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = _dense(33, 70, dtype=dtype, batch=2, heads=4, kv_heads=2)
        options: dict[str, Any] = {
            "softmax_scale": 0.2,
            "is_causal": True,
            "dropout_p": 0.4,
            "dropout_seed": seed,
        }
        out, logsumexp = kernel.run(q, k, v, **options)
        exact, exact_lse = reference.run(*map(_double, (q, k, v)), **options)
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(logsumexp.double(), exact_lse, rtol=1e-5, atol=2e-5)
    cu = _packed([20, 13])
    q, k, v = (_tensor(33, 2, 16) for _ in range(3))
    options = {
        "softmax_scale": 0.2,
        "dropout_p": 0.9,
        "dropout_seed": seed,
        "max_seqlen_q": 20,
        "max_seqlen_k": 20,
    }
    out, _ = kernel.run(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **options)
    exact, _ = reference.run(*map(_double, (q, k, v)), cu_seqlens_q=cu, cu_seqlens_k=cu, **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_nan_comes_through() -> None:
    q, k, v = _dense(5, 20)
    q[0, 0, 3] = torch.nan
    out, _ = kernel.run(q, k, v, softmax_scale=1.0)
    assert out[0, 0, 3].isnan().all() and out.isnan().sum() == out.shape[-1]


def test_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch entry starts 2^31 + 16 elements after the first. The pages between stay untouched."""
    distance = 2**31 + 16
    if INTERPRETED:  # which would copy all arguments onto themselves after the launch
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    memory = torch.UntypedStorage(2 * distance + 8192, device=DEVICE)
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    far.set_(memory, 0, (2, 1, 20, 16), (distance, 0, 16, 1))
    far.copy_(_tensor(2, 1, 20, 16))
    near = far.clone()
    out, _ = kernel.run(far, far, far, softmax_scale=0.5)
    expected, _ = kernel.run(near, near, near, softmax_scale=0.5)
    assert torch.equal(out, expected)


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    q, k, v = _dense(17, 40, heads=4, kv_heads=2)
    assert bk.explain("attention", q, k, v).chosen == "triton"
    out, logsumexp = bk.attention(q, k, v, is_causal=True, window=(10, None), return_logsumexp=True)
    expected, expected_lse = kernel.run(q, k, v, softmax_scale=32**-0.5, is_causal=True, window_left=10)
    assert torch.equal(out, expected) and torch.equal(logsumexp, expected_lse)


def test_reasons() -> None:
    q, k, v = _dense(3, 3)
    assert "float64" in str(kernel.supports(q.double(), k, v, softmax_scale=1.0))
    wide = torch.empty(1, 1, 1, 257, device=DEVICE)
    assert "257" in str(kernel.supports(wide, wide, wide, softmax_scale=1.0))
    assert "stride" in str(kernel.supports(q.transpose(2, 3), k, v, softmax_scale=1.0))
    assert "meta" in str(kernel.supports(q.to("meta"), k, v, softmax_scale=1.0))


@pytest.mark.parametrize(
    "target", [AMPERE, HOPPER, BLACKWELL, MI300], ids=["sm_80", "sm_90", "sm_100", "gfx942"]
)
def test_tiles_fit(target: Any) -> None:
    for dim in (1, 16, 32, 64, 80, 128, 192, 256):
        for rows in (1, 2, 16, 17, 64, 100, 128, 4096):
            for itemsize in (2, 4):
                for dropout in (False, True):
                    tile = kernel.attention_tile(rows, dim, itemsize, target, dropout)
                    width = max(16, 1 << (dim - 1).bit_length())
                    used = (tile.tile_m + 2 * tile.num_stages * tile.tile_n) * width * itemsize
                    assert used <= target.shared_memory
                    assert tile.tile_m >= 16 and tile.tile_n >= 16 and tile.num_warps in (1, 2, 4, 8)
                    assert tile.tile_m <= 16 or tile.tile_m < 2 * rows  # no more than half a tile is empty
