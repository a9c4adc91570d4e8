"""Attention: against float64, its gradient, its forms, its arguments, and how torch sees it."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bigmodel_kernels as bk
from bigmodel_kernels import backends, verify
from bigmodel_kernels.ops.attention import prepare


def make(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def lengths(*sizes: int) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("case", list(verify.cases("attention")), ids=str)
def test_against_float64(case: verify.Case, cpu_backend: str) -> None:
    result = verify.run_case(case, cpu_backend)
    if cpu_backend == "native" and result.skipped and "the compiled library has no" in result.skipped:
        pytest.skip(result.skipped)
    assert result.ok and result.skipped is None, str(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1)])
def test_agrees_with_torch(cpu_backend: str, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    query, key, value = make(2, heads, 45, 64), make(2, kv_heads, 45, 64), make(2, kv_heads, 45, 64)
    args = [t.to(dtype) for t in (query, key, value)]
    with backends.use(cpu_backend):
        out = bk.attention(*args, is_causal=True)
    expected = F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2)


@given(
    batch=st.integers(1, 3),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    rows=st.integers(1, 70),
    keys=st.integers(1, 70),
    dim=st.integers(1, 80),
    is_causal=st.booleans(),
    left=st.none() | st.integers(0, 80),
    right=st.none() | st.integers(0, 80),
    masked=st.booleans(),
    bias=st.none() | st.tuples(*[st.booleans()] * 4),
    softcap=st.sampled_from([0.0, 3.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_any_shape_and_features(
    backend: str,
    batch: int,
    group: int,
    kv_heads: int,
    rows: int,
    keys: int,
    dim: int,
    is_causal: bool,
    left: int | None,
    right: int | None,
    masked: bool,
    bias: tuple[bool, ...] | None,
    softcap: float,
    alibi: bool,
    sinks: bool,
    seed: int,
) -> None:
    if backend == "native" and (reason := native_reason()):
        pytest.skip(reason)
    torch.manual_seed(seed)
    full = (batch, group * kv_heads, rows, keys)
    query, key, value = (
        make(*full[:3], dim),
        make(batch, kv_heads, keys, dim),
        make(batch, kv_heads, keys, dim),
    )
    options: dict[str, Any] = {"is_causal": is_causal, "window": (left, right), "softcap": softcap}
    if masked:
        options["key_padding_mask"] = torch.rand(batch, keys) < 0.7
    if bias is not None:
        options["bias"] = make(*(n if whole else 1 for n, whole in zip(full, bias, strict=True)))
    if alibi:
        options["alibi_slopes"] = torch.rand(full[:2])
    if sinks:
        options["sinks"] = make(full[1])
    with backends.use(backend):
        out, logsumexp = bk.attention(query, key, value, **options, return_logsumexp=True)
    double = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    expected, sums = verify.attention_formula(query.double(), key.double(), value.double(), **double)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logsumexp.double(), sums, atol=2e-5, rtol=1e-5)


def native_reason() -> str | None:
    from bigmodel_kernels import _native

    return _native.reason()


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_packed_is_each_sequence_alone(backend: str, sizes: list[int], is_causal: bool, seed: int) -> None:
    if backend == "native" and (reason := native_reason()):
        pytest.skip(reason)
    torch.manual_seed(seed)
    qkv = make(sum(sizes), 3, 4, 24)
    cu = lengths(*sizes)
    with backends.use(backend):
        out = bk.attention(*qkv.unbind(1), cu_seqlens_q=cu, cu_seqlens_k=cu, is_causal=is_causal)
        for begin, size in zip(cu.tolist(), sizes, strict=False):
            alone = qkv[begin : begin + size].permute(1, 2, 0, 3)[:, None]
            expected = bk.attention(*alone, is_causal=is_causal)
            torch.testing.assert_close(out[begin : begin + size], expected[0].transpose(0, 1))


def test_padding_is_the_packed_result(cpu_backend: str) -> None:
    query, key, value = (make(3, 2, 20, 16) for _ in range(3))
    sizes = (20, 7, 1)
    mask = torch.stack([torch.arange(20) < n for n in sizes])
    packed = [t.transpose(1, 2)[mask] for t in (query, key, value)]
    with backends.use(cpu_backend):
        padded = bk.attention(query, key, value, key_padding_mask=mask).transpose(1, 2)[mask]
        cu = lengths(*sizes)
        torch.testing.assert_close(bk.attention(*packed, cu_seqlens_q=cu, cu_seqlens_k=cu), padded)


def test_layout_of_the_result(cpu_backend: str) -> None:
    query = make(2, 3, 5, 16)
    with backends.use(cpu_backend):
        out, logsumexp = bk.attention(query, query, query, return_logsumexp=True)
        assert out.shape == query.shape and out.transpose(1, 2).is_contiguous()
        assert logsumexp.shape == (2, 3, 5) and logsumexp.dtype == torch.float32
        packed = make(7, 3, 16, dtype=torch.bfloat16)
        cu = lengths(3, 4)
        out, logsumexp = bk.attention(
            packed, packed, packed, cu_seqlens_q=cu, cu_seqlens_k=cu, return_logsumexp=True
        )
        assert out.is_contiguous() and out.dtype == torch.bfloat16
        assert logsumexp.shape == (3, 7) and logsumexp.dtype == torch.float32


def test_blind_rows_are_zero_and_have_no_gradient(cpu_backend: str) -> None:
    query, key, value = (make(2, 2, 6, 16, grad=True) for _ in range(3))
    mask = torch.tensor([[True] * 6, [False] * 6])
    with backends.use(cpu_backend):
        out, logsumexp = bk.attention(query, key, value, key_padding_mask=mask, return_logsumexp=True)
    assert (out[1] == 0).all() and (logsumexp[1] == -math.inf).all()
    out.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and (tensor.grad[1] == 0).all()


def test_infinite_bias_masks(cpu_backend: str) -> None:
    query = make(1, 2, 8, 16, grad=True)
    bias = torch.zeros(8, 8).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -math.inf)
    with backends.use(cpu_backend):
        out = bk.attention(query, query, query, bias=bias)
        torch.testing.assert_close(out, bk.attention(query, query, query, is_causal=True))
    out.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 2.0},
    "padding": {"key_padding_mask": torch.tensor([[True] * 7, [False] * 4 + [True] * 3])},
    "blind rows": {"key_padding_mask": torch.tensor([[True] * 7, [False] * 7]), "window": (0, 0)},
    "scale": {"softmax_scale": 0.3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi of each sequence": {"alibi_slopes": torch.rand(2, 4), "softcap": 3.0},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor(2**40 + 5)},
}


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", FEATURES)
def test_gradient(name: str, sinks: bool) -> None:
    query = make(2, 4, 3, 2, dtype=torch.float64, grad=True)
    key, value = (make(2, 2, 7, 2, dtype=torch.float64, grad=True) for _ in range(2))
    bias = make(1, 4, 1, 7, dtype=torch.float64, grad=True)
    inputs = [query, key, value, bias, *([make(4, dtype=torch.float64, grad=True)] if sinks else [])]

    def function(q: Tensor, k: Tensor, v: Tensor, b: Tensor, s: Tensor | None = None) -> Any:
        out, logsumexp = bk.attention(q, k, v, bias=b, sinks=s, return_logsumexp=True, **FEATURES[name])
        return out, torch.where(logsumexp.isfinite(), logsumexp, 0.0)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "alibi_slopes": torch.rand(3, 4)},
        {"dropout_p": 0.3, "dropout_seed": torch.tensor(11)},
    ],
    ids=["plain", "alibi", "dropout"],
)
def test_gradient_packed(options: dict[str, Any]) -> None:
    query = make(9, 4, 2, dtype=torch.float64, grad=True)
    key, value = (make(8, 2, 2, dtype=torch.float64, grad=True) for _ in range(2))
    sinks = make(4, dtype=torch.float64, grad=True)
    ends = {"cu_seqlens_q": lengths(4, 0, 5), "cu_seqlens_k": lengths(5, 0, 3)}

    def function(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Any:
        return bk.attention(q, k, v, sinks=s, return_logsumexp=True, **ends, **options)

    assert torch.autograd.gradcheck(function, (query, key, value, sinks))


def test_gradient_of_sinks_where_no_key_is_seen() -> None:
    """All of a blind row's sum is the sink: its logsumexp is the sink and its gradient goes there."""
    query, key = make(1, 2, 5, 8), make(1, 2, 3, 8)
    sinks = make(2, grad=True)
    for mask, window in ((torch.zeros(1, 3, dtype=torch.bool), None), (None, (0, -0))):
        out, logsumexp = bk.attention(
            query, key, key, sinks=sinks, key_padding_mask=mask, window=window, return_logsumexp=True
        )
        blind = 5 if window is None else 2  # rows before the first key
        assert (out[:, :, :blind] == 0).all()
        torch.testing.assert_close(logsumexp[0, :, :blind], sinks[:, None].expand(2, blind))
        (gradient,) = torch.autograd.grad(logsumexp[:, :, :blind].sum(), sinks)
        torch.testing.assert_close(gradient, torch.full((2,), float(blind)))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every second"])
def test_gradient_of_any_layout(layout: str, cpu_backend: str) -> None:
    query = make(2, 4, 6, 16, grad=True)
    weights = make(2, 4, 6, 32)
    grad = {
        "expanded": weights[:1, :1, :1, :1].expand(2, 4, 6, 16),
        "transposed": weights[..., :16].transpose(1, 2).contiguous().transpose(1, 2),
        "every second": weights[..., ::2],
    }[layout]
    with backends.use(cpu_backend):
        out = bk.attention(query, query, query, is_causal=True)
        (strided,) = torch.autograd.grad(out, query, grad, retain_graph=True)
        (expected,) = torch.autograd.grad(out, query, grad.contiguous())
    torch.testing.assert_close(strided, expected, rtol=0, atol=0)


def test_forward_keeps_its_result_and_logsumexp_alone() -> None:
    """What is kept for the backward grows with S, not with S x S."""
    query, key, value = (make(2, 4, 64, 16, grad=True) for _ in range(3))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = bk.attention(query, key, value, dropout_p=0.1, is_causal=True)
    shared = {t.untyped_storage().data_ptr() for t in (query, key, value, out)}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in shared]
    assert sorted(t.numel() for t in extra) == [1, 2 * 4 * 64]  # the seed and the logsumexp


def test_deterministic(cpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument and the flag of torch reach the operator, and the bits are the same from run to run."""
    seen: list[bool] = []
    run = backends.run

    def watched(op: str, device: str, args: Any, kwargs: Any) -> Any:
        if op == "attention_backward":
            seen.append(kwargs["deterministic"])
        return run(op, device, args, kwargs)

    monkeypatch.setattr(backends, "run", watched)
    query, bias = make(2, 4, 70, 16, grad=True), make(1, 4, 1, 70, grad=True)
    out = bk.attention(query, query, query, bias=bias)
    torch.autograd.grad(out.sum(), query, retain_graph=True)
    torch.autograd.grad(bk.attention(query, query, query, deterministic=True).sum(), query)
    torch.use_deterministic_algorithms(True)
    try:
        with backends.use(cpu_backend):
            out = bk.attention(query, query, query, bias=bias)
            first = torch.autograd.grad(out.square().sum(), (query, bias), retain_graph=True)
            second = torch.autograd.grad(out.square().sum(), (query, bias))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True, True, True]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_of_a_part() -> None:
    query, key = make(1, 2, 5, 8, grad=True), make(1, 2, 5, 8)
    _, logsumexp = bk.attention(query, key, key, return_logsumexp=True)
    logsumexp.sum().backward()
    again = query.detach().requires_grad_()
    (expected,) = torch.autograd.grad(
        torch.logsumexp(again @ key.transpose(-1, -2) / math.sqrt(8), -1).sum(), again
    )
    torch.testing.assert_close(query.grad, expected)
    assert key.grad is None


def test_second_derivative_raises() -> None:
    query = make(1, 1, 3, 4, dtype=torch.float64, grad=True)
    (gradient,) = torch.autograd.grad(bk.attention(query, query, query).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


# Dropout.


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    query, value = make(2, 4, 64, 16), torch.ones(2, 4, 64, 16)
    torch.manual_seed(3)
    first = bk.attention(query, query, value, dropout_p=0.25)
    second = bk.attention(query, query, value, dropout_p=0.25)
    torch.manual_seed(3)
    again = bk.attention(query, query, value, dropout_p=0.25)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert abs(first.mean().item() - 1) < 0.05
    assert torch.equal(bk.attention(query, query, value, dropout_p=0.0), bk.attention(query, query, value))


def test_dropout_drops_the_probability_asked_for() -> None:
    query = torch.zeros(1, 2, 128, 128)
    out = bk.attention(query, query, torch.eye(128).expand(1, 2, 128, 128), dropout_p=0.3)
    kept = out > 0
    assert abs(kept.float().mean().item() - 0.7) < 0.01
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 128 / 0.7))


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_with_dropout(packed: bool) -> None:
    shape = (9, 2, 3) if packed else (2, 2, 5, 3)
    ends = {"cu_seqlens_q": lengths(4, 5), "cu_seqlens_k": lengths(4, 5)} if packed else {}
    inputs = tuple(make(*shape, dtype=torch.float64, grad=True) for _ in range(3))
    args, options = prepare(*inputs, dropout_p=0.4, is_causal=True, **ends)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.ops.bigmodel.attention(q, k, v, *args[3:], **options)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_with_dropout_in_float32(packed: bool, cpu_backend: str) -> None:
    """The backward drops what the forward dropped, in blocks of rows and of a window's keys."""
    torch.manual_seed(4)
    inputs = [make(300, 2, 16) if packed else make(1, 2, 300, 16) for _ in range(3)]
    options: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": torch.tensor(99), "window": (70, 3)}
    if packed:
        options |= {"cu_seqlens_q": lengths(290, 10), "cu_seqlens_k": lengths(290, 10)}
    with backends.use(cpu_backend):
        chosen = bk.explain("attention", *inputs, **options)
        if chosen.error and "the compiled library has no" in chosen.error:
            pytest.skip(chosen.error)
        got = gradients_of(inputs, options)
    exact = gradients_of([t.double() for t in inputs], options)  # in the reference
    for gradient, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=1e-5, rtol=1e-5)


def gradients_of(inputs: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = bk.attention(*leaves, **options)
    assert isinstance(out, Tensor)
    return torch.autograd.grad(out.square().sum(), leaves)


def test_dropout_under_checkpointing() -> None:
    query = make(1, 2, 9, 8, grad=True)

    def function(q: Tensor) -> Any:
        return bk.attention(q, q, q, dropout_p=0.5)

    torch.manual_seed(1)
    function(query).sum().backward()
    expected, query.grad = query.grad, None
    torch.manual_seed(1)
    checkpoint(function, query, use_reentrant=False).sum().backward()
    torch.testing.assert_close(query.grad, expected)


# How torch sees the operator.

OPTION_SETS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    (
        "mask, bias",
        {"key_padding_mask": torch.rand(2, 7) < 0.8, "bias": torch.randn(1, 4, 1, 7, requires_grad=True)},
    ),
    ("causal, window, softcap", {"is_causal": True, "window": (3, None), "softcap": 4.0}),
    ("dropout", {"dropout_p": 0.3}),
    ("alibi, sinks", {"alibi_slopes": torch.rand(4), "sinks": torch.randn(4, requires_grad=True)}),
    (
        "packed",
        {"cu_seqlens_q": lengths(4, 1), "cu_seqlens_k": lengths(5, 2), "max_seqlen_q": 4, "max_seqlen_k": 5},
    ),
]


def inputs_for(
    options: dict[str, Any], grad: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    if "cu_seqlens_q" in options:
        return [make(n, h, 8, grad=grad, dtype=dtype) for n, h in ((5, 4), (7, 2), (7, 2))]
    return [make(2, h, n, 8, grad=grad, dtype=dtype) for n, h in ((5, 4), (7, 2), (7, 2))]


@pytest.mark.parametrize("name, options", OPTION_SETS, ids=[name for name, _ in OPTION_SETS])
def test_opcheck(name: str, options: dict[str, Any], cpu_backend: str) -> None:
    args, kwargs = prepare(*inputs_for(options), **options)
    with backends.use(cpu_backend):
        chosen = bk.explain("attention", *inputs_for(options), **options)
        if chosen.error and "the compiled library has no" in chosen.error:
            pytest.skip(chosen.error)
        torch.library.opcheck(torch.ops.bigmodel.attention.default, args, kwargs)


@pytest.mark.parametrize("name, options", OPTION_SETS, ids=[name for name, _ in OPTION_SETS])
def test_opcheck_backward(name: str, options: dict[str, Any]) -> None:
    options = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
    args, kwargs = prepare(*inputs_for(options, grad=False), **options)
    query, key, value = args[:3]
    out, logsumexp = torch.ops.bigmodel.attention(*args, **kwargs)
    for grad_logsumexp in (None, torch.randn_like(logsumexp)):
        torch.library.opcheck(
            torch.ops.bigmodel.attention_backward.default,
            (torch.randn_like(out), grad_logsumexp, query, key, value, out, logsumexp, *args[3:]),
            {**kwargs, "bias_requires_grad": True, "sinks_require_grad": True},
        )


@pytest.mark.parametrize("name, options", OPTION_SETS, ids=[name for name, _ in OPTION_SETS])
def test_compile_without_a_break(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    inputs = inputs_for(options)
    leaves = [*inputs, *(t for t in options.values() if isinstance(t, Tensor) and t.requires_grad)]

    def function(*tensors: Tensor) -> Any:
        out = bk.attention(*tensors, **options)
        assert isinstance(out, Tensor)
        return out * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    expected = function(*inputs)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    torch.manual_seed(5)
    out = compiled(*inputs)  # with dropout too: the seed comes from the same generator
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), gradients)


# torch.vmap.

VMAPPED: list[tuple[str, tuple[int | None, ...], dict[str, int], dict[str, Any]]] = [
    ("all", (0, 0, 0), {}, {"is_causal": True}),
    ("query, dimension 2", (2, None, None), {}, {"window": (3, 1)}),
    ("one query, many keys", (None, 1, 0), {"key_padding_mask": 1}, {}),
    ("bias and slopes", (0, 0, 0), {"bias": 0, "alibi_slopes": 0}, {"sinks": torch.randn(4)}),
    ("shared bias and slopes", (0, 0, 0), {}, {"bias": torch.randn(5, 7), "alibi_slopes": torch.rand(2, 4)}),
    ("sinks", (0, None, 0), {"sinks": 0}, {}),
    ("dropout", (0, 0, 0), {"dropout_seed": 0}, {"dropout_p": 0.4}),
    ("the same dropout", (0, 0, 0), {}, {"dropout_p": 0.4, "dropout_seed": torch.tensor(3)}),
]


@pytest.mark.parametrize("name, dims, mapped, options", VMAPPED, ids=[v[0] for v in VMAPPED])
def test_vmap_is_one_call_after_another(
    name: str, dims: tuple[int | None, ...], mapped: dict[str, int], options: dict[str, Any]
) -> None:
    size = 3
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))

    def tensor(shape: tuple[int, ...], dim: int | None) -> Tensor:
        return make(*shape) if dim is None else make(*shape[:dim], size, *shape[dim:])

    made = {
        "key_padding_mask": lambda: torch.rand(2, size, 7) < 0.7,
        "bias": lambda: make(size, 4, 1, 7),
        "alibi_slopes": lambda: torch.rand(size, 4),
        "sinks": lambda: make(size, 4),
        "dropout_seed": lambda: torch.randint(0, 2**62, (size,)),
    }
    tensors = [tensor(shape, dim) for shape, dim in zip(shapes, dims, strict=True)]
    extra = {key: made[key]() for key in mapped}

    def function(q: Tensor, k: Tensor, v: Tensor, more: dict[str, Tensor]) -> Any:
        return bk.attention(q, k, v, return_logsumexp=True, **options, **more)

    got = torch.vmap(function, in_dims=(*dims, mapped))(*tensors, extra)

    def part(t: Tensor, dim: int | None, n: int) -> Tensor:
        return t if dim is None else t.select(dim, n)

    expected = [
        function(
            *(part(t, d, n) for t, d in zip(tensors, dims, strict=True)),
            {key: part(extra[key], d, n) for key, d in mapped.items()},
        )
        for n in range(size)
    ]
    for out, parts in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(out, torch.stack(parts))


def test_vmap_of_packed_sequences() -> None:
    query, cu = make(3, 5, 2, 8), lengths(2, 3)

    def function(q: Tensor) -> Any:
        return bk.attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)

    torch.testing.assert_close(torch.vmap(function)(query), torch.stack([function(q) for q in query]))


@pytest.mark.parametrize("wanted", [("query",), ("key", "bias"), ("sinks",)], ids=str)
def test_vmap_of_the_backward(wanted: tuple[str, ...]) -> None:
    """Many gradients of one forward, as torch.autograd.functional.jacobian(vectorize=True) takes them."""
    tensors = {"query": make(2, 4, 5, 8), "key": make(2, 4, 7, 8), "bias": make(4, 5, 1), "sinks": make(4)}
    leaves = [tensors[name].requires_grad_() for name in wanted]
    out = bk.attention(
        tensors["query"], tensors["key"], tensors["key"], bias=tensors["bias"], sinks=tensors["sinks"]
    )
    grads = make(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        alone = torch.autograd.grad(out, leaves, grads[n], retain_graph=True)
        torch.testing.assert_close(tuple(g[n] for g in batched), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, cpu_backend: str) -> None:
    query, key, value = (make(1, 2, 6, 16, grad=True) for _ in range(3))
    bias = make(6, 6)
    with backends.use(cpu_backend), torch.autocast("cpu", dtype):
        out = bk.attention(query, key.to(dtype), value, bias=bias)
        expected = bk.attention(*(t.to(dtype) for t in (query, key, value)), bias=bias.to(dtype))
        out.float().sum().backward()
    slopes, sinks = torch.rand(2), make(2, grad=True)
    with torch.autocast("cpu", dtype):
        sunk = bk.attention(query, key, value, alibi_slopes=slopes, sinks=sinks)
        sunk.float().square().sum().backward()
    plain = bk.attention(
        *(t.to(dtype) for t in (query, key, value)), alibi_slopes=slopes, sinks=sinks.detach()
    )
    assert torch.equal(sunk, plain) and sinks.grad is not None and sinks.grad.dtype == torch.float32
    assert out.dtype == dtype and torch.equal(out, expected)
    assert query.grad is not None and query.grad.dtype == torch.float32
    double = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype):
        assert bk.attention(double, double, double).dtype == torch.float64


def test_runs_under_inference_mode(cpu_backend: str) -> None:
    with torch.inference_mode(), backends.use(cpu_backend):
        query = make(1, 2, 5, 16)
        assert bk.attention(query, query, query).isfinite().all()


# Arguments.

Q, KV, PACKED = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 7, 16), torch.zeros(5, 2, 16)
CU = lengths(2, 3)
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((Q[0], KV, KV), {}, ValueError, r"query has shape \(4, 5, 16\); it must have 4 dimensions"),
    ((Q, KV[0], KV), {}, ValueError, r"key has shape \(2, 7, 16\); it must have 4"),
    ((Q, KV, KV[:, :, :, None]), {}, ValueError, r"value has shape .* it must have 4"),
    ((Q.int(), KV.int(), KV.int()), {}, TypeError, "query has dtype torch.int32; allowed are"),
    ((Q, KV.half(), KV), {},
     TypeError, "key has dtype torch.float16; it must have that of query, torch.float32"),
    ((Q, KV, KV.bfloat16()), {}, TypeError, "value has dtype torch.bfloat16"),
    ((Q, KV.to("meta"), KV), {}, ValueError, "key is on meta; it must be on the device of query, cpu"),
    ((Q, KV[..., :8], KV[..., :8]), {}, ValueError, "key has head_dim 8; it must be that of query, 16"),
    ((Q, KV, KV[..., :8]), {}, ValueError, r"value has shape \(2, 2, 7, 8\); it must be that of key"),
    ((Q, KV, KV[:, :, :3]), {}, ValueError, r"value has shape \(2, 2, 3, 16\)"),
    ((torch.zeros(1, 1, 1, 257),) * 3, {}, ValueError, "head_dim 257; allowed are 1 to 256"),
    ((torch.zeros(1, 1, 1, 0),) * 3, {}, ValueError, "head_dim 0; allowed are 1 to 256"),
    ((Q[:, :3], KV, KV), {}, ValueError, "key has 2 heads; they must divide the 3 heads of query"),
    ((Q, KV[:, :0], KV[:, :0]), {}, ValueError, "key has 0 heads"),
    ((Q, KV[:1], KV[:1]), {}, ValueError, "key has batch 1; it must be that of query, 2"),
    ((Q, KV, KV), {"bias": torch.zeros(3, 1, 1, 7)},
     ValueError, r"bias has shape \(3, 1, 1, 7\); it must broadcast"),
    ((Q, KV, KV), {"bias": torch.zeros(6)}, ValueError, r"bias has shape \(6,\); .* \(2, 4, 5, 7\)"),
    ((Q, KV, KV), {"bias": torch.zeros(1, 1, 1, 1, 7)}, ValueError, "it must broadcast"),
    ((Q, KV, KV), {"bias": torch.zeros(7).half()}, TypeError, "bias has dtype torch.float16; allowed are"),
    ((Q, KV, KV), {"bias": torch.zeros(7, device="meta")}, ValueError, "bias is on meta"),
    ((Q, KV, KV), {"key_padding_mask": torch.ones(2, 6).bool()},
     ValueError, r"key_padding_mask has shape \(2, 6\)"),
    ((Q, KV, KV), {"key_padding_mask": torch.ones(2, 7)},
     TypeError, "key_padding_mask has dtype torch.float32"),
    ((Q, KV, KV), {"key_padding_mask": torch.ones(7).bool()}, ValueError, r"it must be \(B, Sk\), \(2, 7\)"),
    ((Q, KV, KV), {"window": 5}, TypeError, "window=5 must be a pair"),
    ((Q, KV, KV), {"window": (1, 2, 3)}, TypeError, r"window=\(1, 2, 3\) must be a pair"),
    ((Q, KV, KV), {"window": (-2, 0)}, ValueError, r"window=\(-2, 0\) has a negative side"),
    ((Q, KV, KV), {"softcap": -1.0}, ValueError, "softcap=-1.0 is out of range"),
    ((Q, KV, KV), {"softcap": math.nan}, ValueError, "softcap=nan is out of range"),
    ((Q, KV, KV), {"softmax_scale": math.inf}, ValueError, "softmax_scale=inf is out of range"),
    ((Q, KV, KV), {"dropout_p": 1.0}, ValueError, "dropout_p=1.0 is out of range"),
    ((Q, KV, KV), {"dropout_p": -0.1}, ValueError, "dropout_p=-0.1 is out of range"),
    ((Q, KV, KV), {"dropout_p": 0.5, "dropout_seed": torch.zeros(2).long()},
     ValueError, r"dropout_seed has dtype torch.int64 and shape \(2,\); it must be"),
    ((Q, KV, KV), {"alibi_slopes": torch.zeros(4).half()},
     TypeError, "alibi_slopes has dtype torch.float16; it must be torch.float32"),
    ((Q, KV, KV), {"alibi_slopes": torch.zeros(2)},
     ValueError, r"alibi_slopes has shape \(2,\); it must be \(H,\) or \(B, H\), \(4,\) or \(2, 4\)"),
    ((Q, KV, KV), {"alibi_slopes": torch.zeros(3, 4)}, ValueError, r"alibi_slopes has shape \(3, 4\)"),
    ((Q, KV, KV), {"alibi_slopes": torch.zeros(4, device="meta")}, ValueError, "alibi_slopes is on meta"),
    ((Q, KV, KV), {"alibi_slopes": torch.zeros(4, requires_grad=True)},
     ValueError, r"alibi_slopes requires grad, .* pass alibi_slopes.detach\(\)"),
    ((Q, KV, KV), {"sinks": torch.zeros(2, 4)}, ValueError, r"sinks has shape \(2, 4\); it must be \(H,\)"),
    ((Q, KV, KV), {"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \(2,\); .* \(4,\)"),
    ((Q, KV, KV), {"sinks": torch.zeros(4).half()},
     TypeError, "sinks has dtype torch.float16; allowed are that of query, torch.float32, and"),
    ((Q, KV, KV), {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks is on meta"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "alibi_slopes": torch.zeros(3, 2)},
     ValueError, r"alibi_slopes has shape \(3, 2\); .* \(2,\) or \(2, 2\)"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU}, ValueError, "cu_seqlens_k is None"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": CU.long()},
     TypeError, "cu_seqlens_k has dtype torch.int64"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU[None], "cu_seqlens_k": CU},
     ValueError, r"cu_seqlens_q has shape \(1, 3\)"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU[:0], "cu_seqlens_k": CU},
     ValueError, r"cu_seqlens_q has shape \(0,\)"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": lengths(5)},
     ValueError, r"cu_seqlens_k has shape \(2,\)"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU + 1, "cu_seqlens_k": CU}, ValueError, "cu_seqlens_q starts at 1"),
    ((PACKED,) * 3, {"cu_seqlens_q": lengths(6, -1), "cu_seqlens_k": CU},
     ValueError, "goes down from 6 to 5"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": lengths(2, 4)},
     ValueError, "cu_seqlens_k ends at 6; .* 5"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": lengths(2, 2)},
     ValueError, "cu_seqlens_k ends at 4"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 2},
     ValueError, "max_seqlen_q=2 is less"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_k": -1},
     ValueError, "max_seqlen_k=-1"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": CU.to("meta"), "max_seqlen_k": 3},
     ValueError, "is on meta"),
    ((PACKED,) * 3, {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "bias": torch.zeros(1)},
     ValueError, "bias has shape"),
    ((Q, KV, KV), {"cu_seqlens_q": CU, "cu_seqlens_k": CU}, ValueError, "query has shape .* 3 dimensions"),
]  # fmt: skip


@pytest.mark.parametrize(
    "args, options, kind, message", BAD, ids=[f"{i}: {b[3][:40]}" for i, b in enumerate(BAD)]
)
def test_bad_arguments(
    args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        bk.attention(*args, **options)
    if "window" not in options:
        with pytest.raises(kind, match=message):  # the operator itself is as safe as the function
            op_args, op_options = prepare(*args, **options)
            torch.ops.bigmodel.attention(*op_args, **op_options)


def test_bad_arguments_of_the_backward() -> None:
    query = make(1, 2, 5, 8)
    out, logsumexp = torch.ops.bigmodel.attention(query, query, query, softmax_scale=1.0)
    for place, name in ((0, "grad_out"), (1, "grad_logsumexp"), (5, "out"), (6, "logsumexp")):
        values: list[Any] = [out, logsumexp, query, query, query, out, logsumexp]
        for bad, kind, message in (
            (torch.zeros(3), ValueError, r"has shape \(3,\); it must be"),
            (values[place].half(), TypeError, "has dtype torch.float16; it must be torch.float32"),
            (values[place].to("meta"), ValueError, "is on meta; it must be on the device of query, cpu"),
        ):
            with pytest.raises(kind, match=f"^{name} {message}"):
                torch.ops.bigmodel.attention_backward(
                    *values[:place], bad, *values[place + 1 :], softmax_scale=1.0
                )


def test_raw_operator_without_dropout_seed() -> None:
    with pytest.raises(ValueError, match="dropout_seed is None"):
        torch.ops.bigmodel.attention(Q, KV, KV, softmax_scale=1.0, dropout_p=0.5)


# Memory.


def test_no_square_tensor() -> None:
    """S = 8192: one S x S tensor of float32 would take 256 MiB; forward and backward stay far below."""
    script = """
        import resource, torch, sys
        torch.set_num_threads(1)
        import bigmodel_kernels as bk
        from bigmodel_kernels import backends

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        query = torch.randn(1, 1, 256, 32, requires_grad=True)
        bk.attention(query, query, query).sum().backward()
        query = torch.randn(1, 1, 8192, 32, requires_grad=True)
        before = peak()
        with backends.use(sys.argv[1] or None):
            out = bk.attention(query, query, query, is_causal=True, window=(4000, None))
        middle = peak()
        out.sum().backward()
        print(middle - before, peak() - middle)
    """
    for backend in ("reference", "native" if native_reason() is None else ""):
        output = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), backend],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        forward, backward = (float(v) for v in output.split())
        assert forward < 100 and backward < 150, f"{backend or 'default'}: {output} MiB"
