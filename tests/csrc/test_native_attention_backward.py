"""Gradients of attention by the compiled library, for every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigmodel_kernels import _native
from bigmodel_kernels.ops.attention import native, prepare, reference
from bigmodel_kernels.verify import compare

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))


def make(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int) -> tuple[Tensor, ...]:
    sizes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return tuple(torch.randn(size) for size in sizes)


def check(*tensors: Tensor, grad_lse: bool = False, **call: Any) -> None:
    """Holds the gradients to the numerics rule; eager is the reference in the dtype under test."""
    args, options = prepare(*tensors, **call)
    wants = {"bias_requires_grad": args[4] is not None, "sinks_require_grad": args[9] is not None}
    out, lse = native.run(*args, **options)
    grads = (torch.randn_like(args[0]), torch.randn_like(lse) if grad_lse else None)
    mine = native.run_backward(*grads, *args[:3], out, lse, *args[3:], **options, **wants)
    usual = reference.run_backward(
        *grads, *args[:3], *reference.run(*args, **options), *args[3:], **options, **wants
    )
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact = reference.run_backward(
        *(None if g is None else g.double() for g in grads),
        *wide[:3],
        *reference.run(*wide, **options),
        *wide[3:],
        **options,
        **wants,
    )
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    for name, got, eager, right in zip(names, mine, usual, exact, strict=True):
        assert got.dtype == eager.dtype
        verdict = compare(got, eager, right, "gradient")
        assert verdict.ok, (name, verdict)


CALLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 1, 1, 1, 1, 1), {}),
    ((2, 4, 4, 70, 77, 64), {}),
    ((1, 4, 2, 130, 200, 40), {"is_causal": True, "grad_lse": True}),
    ((1, 6, 2, 127, 129, 64), {"window": (40, 3)}),
    ((1, 2, 2, 17, 300, 96), {"softcap": 5.0}),
    ((1, 2, 1, 129, 128, 256), {"is_causal": True}),
    ((2, 4, 4, 128, 128, 64), {"dropout_p": 0.3}),
    ((1, 6, 2, 50, 130, 16), {"dropout_p": 0.5, "is_causal": True, "window": (60, None)}),
    ((1, 3, 3, 200, 5, 7), {"is_causal": True}),
    ((1, 4, 2, 75, 131, 33), {"softcap": 5.0, "window": (90, 30), "grad_lse": True}),
    ((1, 1, 1, 300, 290, 160), {"dropout_p": 0.1}),
    ((2, 8, 1, 4, 300, 128), {"softmax_scale": 1.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "call"), CALLS, ids=str)
def test_gradients(isa: str, size: tuple[int, ...], call: dict[str, Any], dtype: torch.dtype) -> None:
    check(*(t.to(dtype) for t in make(*size)), **call)


def test_padding_bias_alibi_and_sinks(isa: str) -> None:
    mask = torch.rand(3, 90) < 0.5
    mask[1] = False
    check(*make(3, 2, 2, 33, 90, 64), key_padding_mask=mask)
    for size in ((2, 4, 50, 60), (4, 50, 60), (2, 1, 50, 60), (50, 1), (60,)):
        check(*make(2, 4, 2, 50, 60, 32), bias=torch.randn(size))
    check(*make(2, 4, 4, 50, 60, 32), sinks=torch.randn(4), alibi_slopes=torch.rand(4), is_causal=True)
    mask = torch.rand(2, 140) < 0.5
    check(*make(2, 2, 2, 130, 140, 32), key_padding_mask=mask, bias=torch.randn(2, 130, 140), softcap=4.0)
    check(*make(2, 2, 1, 70, 131, 32), sinks=torch.randn(2), alibi_slopes=torch.rand(2), is_causal=True)


@pytest.mark.parametrize("size", [(2, 4, 2, 33, 40, 32), (1, 2, 1, 5, 3, 16)], ids=str)
def test_masks_of_the_lowest_float(isa: str, size: tuple[int, ...]) -> None:
    """Some keys, and all keys of a query, masked by it; times log2(e) it is beyond float32."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(size[3], size[4])
    bias[:, 0] = bias[1] = lowest
    check(*make(*size), bias=bias)
    check(*make(*size), bias=bias, softmax_scale=3.0, grad_lse=True)
    check(*(t.bfloat16() for t in make(*size)), bias=bias)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("where", range(4), ids=["query", "key", "value", "grad"])
def test_numbers_without_bf16_parts(isa: str, where: int, value: float) -> None:
    """They change what float32 products change, and nothing else. 3.4e38 would be infinite in bf16."""
    tensors = make(1, 1, 1, 150, 160, 40)
    grad = torch.randn_like(tensors[0])
    (*tensors, grad)[where][0, 0, 137, 30] = value
    args, options = prepare(*tensors, bias=torch.randn(150, 160) * 0.1, is_causal=True)
    results = []
    for name in (isa, torch.ops.bigmodel.cpu_isas().split(", ")[-1]):
        torch.ops.bigmodel.cpu_set_isa(name)
        out, lse = native.run(*args, **options)
        results.append(
            native.run_backward(
                grad, None, *args[:3], out, lse, *args[3:], **options, bias_requires_grad=True
            )
        )
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-3, atol=1e-5, equal_nan=True)


def test_packed_sequences(isa: str) -> None:
    """Of no query, of no key, and longer than a block."""
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 5, 5, 150, 160], [0, 70, 71, 300, 300]))
    tensors = (torch.randn(160, 4, 64), torch.randn(300, 2, 64), torch.randn(300, 2, 64))
    check(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, is_causal=True)
    check(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, dropout_p=0.2, grad_lse=True)


def test_views_of_a_fused_projection(isa: str) -> None:
    qkv = torch.randn(2, 50, 3, 4, 64)
    check(*qkv.permute(2, 0, 3, 1, 4).unbind(0))


def test_the_same_bits_whatever_the_threads() -> None:
    args, options = prepare(*make(2, 4, 2, 150, 150, 64), is_causal=True, bias=torch.randn(150, 150))
    out, lse = native.run(*args, **options)
    grad = torch.randn_like(out)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(
            native.run_backward(
                grad, None, *args[:3], out, lse, *args[3:], **options, bias_requires_grad=True
            )
        )
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_bad_arguments_are_refused() -> None:
    args, options = prepare(*make(1, 2, 2, 8, 8, 16))
    out, lse = native.run(*args, **options)
    with pytest.raises(RuntimeError, match=r"grad_out: shape .* must be query's"):
        native.run_backward(out[:, :, :7], None, *args[:3], out, lse, *args[3:], **options)
    with pytest.raises(RuntimeError, match=r"logsumexp: shape .* must be that of the forward's"):
        native.run_backward(out, None, *args[:3], out, lse[:, :, :7], *args[3:], **options)
