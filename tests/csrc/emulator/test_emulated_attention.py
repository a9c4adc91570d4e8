"""The CUDA attention kernels, run in the emulator, against float64 by the rule of `numerics`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_attention import make, plain
from torch import Tensor

from bigmodel_kernels.ops.attention import prepare, reference
from bigmodel_kernels.verify import compare


def emulated(*tensors: Tensor, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    args, kwargs = prepare(*tensors, **options)
    torch.ops.bigmodel_emulator.set_seed(seed)
    return torch.ops.bigmodel_emulator.cuda_attention(*args, **kwargs)  # type: ignore[no-any-return]


def check(*tensors: Tensor, seed: int = 0, **options: Any) -> Tensor:
    """Holds the output to the numerics rule, and the logsumexp to rounding; returns the output."""
    out, lse = emulated(*tensors, seed=seed, **options)
    args, kwargs = prepare(*tensors, **options)
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    if args[7] is not None:
        pytest.fail("dropout draws its seed; see test_dropout")
    ref, ref_lse = reference.run(*wide, **kwargs)
    eager = plain(*args, **kwargs)
    verdict = compare(out, eager, ref)
    assert verdict.ok, verdict
    finite = ref_lse.isfinite()
    assert (lse.isfinite() == finite).all()
    assert torch.allclose(lse[finite].double(), ref_lse[finite], atol=2e-5, rtol=2e-5)
    return out


pytestmark = pytest.mark.usefixtures("library", "architecture")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 32, 40, 64, 96, 128, 192, 256])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(*make(1, 2, 2, 70, 77, dim, dtype), is_causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (17, 127), (129, 129), (257, 33), (5, 1000)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(queries: int, keys: int, causal: bool) -> None:
    check(*make(2, 2, 1, queries, keys, 64, torch.bfloat16), is_causal=causal)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (16, None)},
        {"window": (None, 9)},
        {"window": (0, 0)},
        {"window": (40, 3), "softcap": 5.0},
        {"softcap": 20.0, "is_causal": True},
        {"softmax_scale": 8.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    check(*make(1, 2, 1, 100, 140, 64, torch.float16), **options)


def test_key_padding_and_rows_without_a_key() -> None:
    mask = torch.rand(3, 90) < 0.6
    mask[1] = False
    query, key, value = make(3, 2, 2, 33, 90, 64, torch.bfloat16)
    check(query, key, value, key_padding_mask=mask)
    out, lse = emulated(query, key, value, key_padding_mask=mask)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("size", [(2, 4, 50, 60), (4, 1, 60), (50, 1), (2, 1, 50, 60)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*make(2, 4, 2, 50, 60, 32, torch.bfloat16), bias=torch.randn(size).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_the_lowest_number(dtype: torch.dtype) -> None:
    """Times log2(e) it is beyond float32: as -inf, for a query all of whose keys have it too."""
    bias = torch.zeros(33, 40, dtype=dtype)
    bias[:, 0] = torch.finfo(dtype).min
    tensors = make(2, 4, 2, 33, 40, 32, torch.bfloat16)
    check(*tensors, bias=bias)
    bias[1] = torch.finfo(dtype).min
    out, lse = emulated(*tensors, bias=bias)
    assert out.isfinite().all()
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()


def test_alibi_and_sinks() -> None:
    tensors = make(2, 4, 2, 45, 70, 64, torch.float16)
    check(*tensors, alibi_slopes=torch.rand(4), is_causal=True)
    check(*tensors, alibi_slopes=torch.rand(2, 4), sinks=torch.randn(4))
    mask = torch.zeros(2, 70, dtype=torch.bool)
    out, lse = emulated(*tensors, key_padding_mask=mask, sinks=torch.tensor([0.5, -1.0, 2.0, 30.0]))
    assert (out == 0).all()
    assert torch.allclose(lse[0, :, 0], torch.tensor([0.5, -1.0, 2.0, 30.0]))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal: bool) -> None:
    """Sequences of no query, of one key, of no key; and a neighbour whose values are not numbers."""
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 5, 5, 140, 150], [0, 70, 71, 200, 200]))
    query, key, value = (torch.randn(n, 2, 64).to(torch.bfloat16) for n in (150, 200, 200))
    check(query, key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, is_causal=causal)
    clean, _ = emulated(query, key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, is_causal=causal)
    value[71:] = float("nan")
    out, _ = emulated(query, key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, is_causal=causal)
    assert torch.equal(out[:5], clean[:5])


def test_fused_projection_is_read_in_place() -> None:
    qkv = torch.randn(2, 50, 3, 4, 64).to(torch.float16)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    check(query, key, value, is_causal=True)


@pytest.mark.parametrize("longest", [60, 190])
@pytest.mark.parametrize("causal", [False, True])
def test_short_sequences_of_a_fused_projection(longest: int, causal: bool) -> None:
    """(tokens, 3, heads, head_dim) read in place, more sequences than a warp has lanes, in one launch. On
    Hopper by two consumer warpgroups and by three. Every block has many tiles, in any order of threads."""
    lengths = [longest, 0, *torch.randint(1, 40, (34,)).tolist()]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = torch.randn(int(cu[-1]), 3, 1, 32).bfloat16().unbind(1)
    call: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "is_causal": causal}
    first = check(query, key, value, **call)
    assert torch.equal(first, emulated(query, key, value, seed=1, **call)[0])


def test_scales_that_are_not_positive() -> None:
    """The short inner loop takes a row's maximum before it scales."""
    for scale in (0.0, -0.3):
        check(*make(1, 2, 1, 40, 70, 64, torch.float16), softmax_scale=scale, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_the_reference_drops(dtype: torch.dtype) -> None:
    tensors = make(2, 2, 2, 40, 150, 32, dtype)
    args, kwargs = prepare(*tensors, dropout_p=0.3)
    out, lse = torch.ops.bigmodel_emulator.cuda_attention(*args, **kwargs)
    ref, ref_lse = reference.run(*(t.double() for t in tensors), *args[3:], **kwargs)
    assert torch.allclose(out.double(), ref, atol=4e-2 if dtype == torch.bfloat16 else 5e-3)
    assert torch.allclose(lse.double(), ref_lse, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "dim"), [(130, 140, 64), (200, 600, 64), (130, 600, 128)])
def test_any_order_of_threads_gives_the_same_bits(queries: int, keys: int, dim: int) -> None:
    """On Hopper: three and two warpgroups that take turns, over one tile, two and many."""
    tensors = make(1, 1, 1, queries, keys, dim, torch.bfloat16)
    first, _ = emulated(*tensors, is_causal=True)
    for seed in (1, 2, 3):
        again, _ = emulated(*tensors, seed=seed, is_causal=True)
        assert torch.equal(first, again)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    dim=st.integers(1, 16).map(lambda i: 8 * i),
    causal=st.booleans(),
    window=st.tuples(*[st.one_of(st.none(), st.integers(0, 60))] * 2),
    masked=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_call(
    library: Path, batch: int, kv_heads: int, group: int, queries: int, keys: int, dim: int, causal: bool,
    window: tuple[int | None, int | None], masked: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(queries * 151 + keys)
    tensors = make(batch, kv_heads * group, kv_heads, queries, keys, dim, torch.bfloat16)
    mask = torch.rand(batch, keys) < 0.7 if masked else None
    check(*tensors, is_causal=causal, window=window, key_padding_mask=mask, seed=seed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q, k[:, :, :, :32], v), "key: head_dim 32 differs from query's 64"),
        (lambda q, k, v: (q[0], k, v), "query: shape"),
        (lambda q, k, v: (q, k[:1], v[:1]), "key: batch 1 must be query's 2"),
        (lambda q, k, v: (q, k, v[:, :, :3]), "value: shape"),
        (lambda q, k, v: (q[:, :3], k, v), "2 kv heads do not divide 3"),
        (lambda q, k, v: (q.float(), k.float(), v.float()), "float16 or bfloat16"),
        (
            lambda q, k, v: tuple(t[..., :36].contiguous() for t in (q, k, v)),
            "head_dim 36 must be a multiple of 8",
        ),
        (lambda q, k, v: (q[..., 4:60], k[..., 4:60], v[..., 4:60]), "must start at a multiple of 16 bytes"),
    ],
)
def test_bad_input_is_refused(change: Any, words: str) -> None:
    tensors = make(2, 4, 2, 8, 8, 64, torch.float16)
    with pytest.raises(RuntimeError, match="^" + ".*" + words.replace("(", r"\(")):
        torch.ops.bigmodel_emulator.cuda_attention(*change(*tensors), softmax_scale=1.0)
