"""Rotary embedding: against float64, against a rotation of complex numbers, and how torch sees it."""

from __future__ import annotations

from typing import Any

import operator_checks as checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import backends, verify
from bigmodel_kernels.ops.rotary import prepare


def angles(rows: int, size: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin (batch, rows, size) as Llama makes them, of random positions."""
    positions = torch.randint(0, 5000, (batch, rows, 1)).double()
    turned = positions / 10000 ** (torch.arange(size).double() / size)
    return turned.cos().to(dtype), turned.sin().to(dtype)


def half_turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def formula(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """As models write it: x * cos + half_turn(x) * sin, with every angle twice."""
    size = 2 * cos.shape[-1]
    cos, sin = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))

    def one(x: Tensor) -> Tensor:
        turned, rest = x[..., :size], x[..., size:]
        if interleaved:
            turned = torch.cat([turned[..., ::2], turned[..., 1::2]], -1)
        turned = turned * cos.to(x.dtype) + half_turn(turned) * sin.to(x.dtype)
        if interleaved:
            turned = torch.stack(turned.chunk(2, -1), -1).flatten(-2)
        return torch.cat([turned, rest], -1)

    return one(query), one(key)


def skip_if_missing(backend: str, *args: Any, **options: Any) -> None:
    with backends.use(backend):
        chosen = bk.explain("rotary", *args, **options)
    if chosen.error and "the compiled library has no" in chosen.error:
        pytest.skip(chosen.error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dim, size", [(64, 32), (128, 64), (80, 16), (6, 1), (33, 16), (256, 128)])
def test_against_float64(
    dim: int, size: int, interleaved: bool, dtype: torch.dtype, cpu_backend: str
) -> None:
    query, key = torch.randn(2, 4, 37, dim).to(dtype), torch.randn(2, 2, 37, dim).to(dtype)
    for batch, table_dtype in ((1, torch.float32), (2, dtype)):
        cos, sin = angles(37, size, batch, table_dtype)
        options = {"rotary_dim": 2 * size, "interleaved": interleaved}
        skip_if_missing(cpu_backend, query, key, cos, sin, **options)
        with backends.use(cpu_backend), verify.poisoned():
            results = bk.rotary(query, key, cos, sin, **options)
        eager = formula(query, key, cos, sin, interleaved=interleaved)
        ref = formula(*(t.double() for t in (query, key, cos, sin)), interleaved=interleaved)
        for got, of_eager, exact in zip(results, eager, ref, strict=True):
            verdict = verify.compare(got, of_eager, exact)
            assert verdict.ok, str(verdict)
            assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    rows=st.integers(0, 9),
    size=st.integers(1, 20),
    rest=st.integers(0, 5),
    shared=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_is_a_rotation(
    batch: int,
    heads: int,
    kv_heads: int,
    rows: int,
    size: int,
    rest: int,
    shared: bool,
    interleaved: bool,
    seed: int,
) -> None:
    """A pair (a, b) is the complex number a + b i, and the result its product with cos + sin i."""
    torch.manual_seed(seed)
    query, key = (torch.randn(batch, h, rows, 2 * size + rest).double() for h in (heads, kv_heads))
    cos, sin = angles(rows, size, 1 if shared else batch, torch.float64)
    got = bk.rotary(query, key, cos, sin, rotary_dim=2 * size, interleaved=interleaved)
    for x, out in zip((query, key), got, strict=True):
        assert out.shape == x.shape

        def pairs(t: Tensor) -> Tensor:
            t = t[..., : 2 * size]
            return torch.complex(*(t[..., i::2] if interleaved else t.chunk(2, -1)[i] for i in (0, 1)))

        torch.testing.assert_close(pairs(out), pairs(x) * torch.complex(cos, sin)[:, None])
        assert torch.equal(out[..., 2 * size :], x[..., 2 * size :])


def test_angles_as_models_make_them(cpu_backend: str) -> None:
    """(B, S, R) with every number twice, and (S, R / 2), are (B, S, R / 2)."""
    query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 1, 9, 16)
    cos, sin = angles(9, 8)
    skip_if_missing(cpu_backend, query, key, cos, sin)
    with backends.use(cpu_backend):
        expected = bk.rotary(query, key, cos, sin)
        for tables in (
            [torch.cat([t, t], -1) for t in (cos, sin)],
            [t[0] for t in (cos, sin)],
            [t.expand(2, 9, 8) for t in (cos, sin)],
        ):
            assert all(map(torch.equal, bk.rotary(query, key, *tables), expected))
        twice = [t.repeat_interleave(2, -1) for t in (cos, sin)]
        assert all(
            map(
                torch.equal,
                bk.rotary(query, key, *twice, interleaved=True),
                bk.rotary(query, key, cos, sin, interleaved=True),
            )
        )
        # An eighth of the head turns: the same 4 numbers are R / 2 of 8 or R of 4, as rotary_dim says.
        few = [t[..., :4] for t in (cos, sin)]
        eight, four = (bk.rotary(query, key, *few, rotary_dim=r)[0] for r in (8, 4))
        assert torch.equal(eight[..., 8:], query[..., 8:]) and not torch.equal(
            eight[..., 4:8], query[..., 4:8]
        )
        assert torch.equal(four[..., 4:], query[..., 4:])


@pytest.mark.parametrize("layout", ["fused", "reversed", "padded"])
def test_layouts(layout: str, cpu_backend: str) -> None:
    if layout == "fused":
        query, key, _ = torch.randn(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
    elif layout == "reversed":
        query, key = (torch.randn(2, 4, 16, 9).transpose(2, 3) for _ in range(2))
    else:
        query, key = (torch.randn(2, 4, 9, 19)[..., :16] for _ in range(2))
    cos, sin = angles(9, 8)
    skip_if_missing(cpu_backend, query, key, cos, sin)
    with backends.use(cpu_backend):
        got = bk.rotary(query, key, cos, sin)
        assert all(map(torch.equal, got, bk.rotary(query.contiguous(), key.contiguous(), cos, sin)))


def call(interleaved: bool = False) -> checks.Call:
    cos, sin = angles(5, 2, 2, torch.float64)
    return (torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), cos, sin), {
        "rotary_dim": 4,
        "interleaved": interleaved,
    }


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_both_orders(interleaved: bool) -> None:
    (query, key, cos, sin), options = call(interleaved)

    def function(q: Tensor, k: Tensor) -> Any:
        return bk.rotary(q, k, cos, sin, **options)

    leaves = (query.double().requires_grad_(), key.double().requires_grad_())
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradient_of_one() -> None:
    (query, key, cos, sin), options = call()
    query, key = query.double().requires_grad_(), key.double()
    turned, _ = bk.rotary(query, key, cos, sin, **options)
    turned.square().sum().backward()
    torch.testing.assert_close(query.grad, 2 * query.detach())  # a rotation keeps lengths
    assert key.grad is None
    _, other = bk.rotary(query, key.requires_grad_(), cos, sin, **options)
    (gradient,) = torch.autograd.grad(other.square().sum(), query, allow_unused=True)
    assert gradient is None


def test_gradient_of_half_precision_is_rounded_once() -> None:
    query, key = (torch.randn(1, 2, 33, 16).bfloat16().requires_grad_() for _ in range(2))
    cos, sin = angles(33, 8)
    grads = [torch.randn(1, 2, 33, 16).bfloat16() for _ in range(2)]
    got = torch.autograd.grad(bk.rotary(query, key, cos, sin), (query, key), grads)
    eager = torch.autograd.grad(formula(query, key, cos, sin), (query, key), grads)
    exact = formula(*(t.double() for t in (*grads, cos, -sin)))
    for one, of_eager, ref in zip(got, eager, exact, strict=True):
        verdict = verify.compare(one, of_eager, ref, "gradient")
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved: bool, cpu_backend: str) -> None:
    (query, key, cos, sin), options = call(interleaved)
    tensors = (query.requires_grad_(), key.requires_grad_(), cos.float(), sin.float())
    skip_if_missing(cpu_backend, *tensors, **options)
    checks.check_operator(torch.ops.bigmodel.rotary.default, prepare(*tensors, **options), cpu_backend)


def test_compile_without_a_break() -> None:
    torch._dynamo.reset()
    (query, key, cos, sin), options = call()
    leaves = [query.requires_grad_(), key.requires_grad_()]

    def function(q: Tensor, k: Tensor) -> Tensor:
        turned, other = bk.rotary(q, k, cos.float(), sin.float(), **options)
        return turned.sum() * other.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves)
    )


@pytest.mark.parametrize("dims", [(0, 0, None, None), (2, None, None, 0), (None, 1, 0, 0), (0, 0, 0, None)])
def test_vmap(dims: tuple[int | None, ...]) -> None:
    shapes = ((2, 4, 5, 6), (2, 2, 5, 6), (1, 5, 3), (1, 5, 3))
    tensors = [
        torch.randn(s if d is None else (*s[:d], 3, *s[d:])) for s, d in zip(shapes, dims, strict=True)
    ]
    got = torch.vmap(bk.rotary, in_dims=dims)(*tensors)
    expected = [
        bk.rotary(*(t if d is None else t.select(d, n) for t, d in zip(tensors, dims, strict=True)))
        for n in range(3)
    ]
    for out, parts in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(out, torch.stack(parts))


def test_autocast_leaves_it_alone() -> None:
    (query, key, cos, sin), options = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert bk.rotary(query, key, cos.float(), sin.float(), **options)[0].dtype == torch.float32


Q, K, COS = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(1, 5, 4)
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((Q.int(), K, COS, COS), {}, TypeError, "query has dtype torch.int32; allowed are"),
    ((Q, K.half(), COS, COS), {}, TypeError, "key has dtype torch.float16; it must have that of query"),
    ((Q, K.to("meta"), COS, COS), {}, ValueError, "key is on meta"),
    ((Q[0], K, COS, COS), {}, ValueError, r"query has shape \(4, 5, 8\); it must have 4 dimensions"),
    ((Q, K[0], COS, COS), {}, ValueError, r"key has shape \(2, 5, 8\); it must have 4 dimensions"),
    ((Q, K[:1], COS, COS), {}, ValueError, r"key has shape \(1, 2, 5, 8\); it must be \(2, Hkv, 5, 8\)"),
    ((Q, K[..., :6], COS, COS), {}, ValueError, r"it must be \(2, Hkv, 5, 8\)"),
    ((Q, K, COS[..., :3], COS), {}, ValueError, r"cos has shape \(1, 5, 3\); .* which is 8"),
    ((Q, K, COS, COS[..., :2]), {}, ValueError, r"sin has shape \(1, 5, 2\); .* which is 8"),
    ((Q, K, COS[:, :4], COS), {}, ValueError, r"cos has shape \(1, 4, 4\); .* \(2, 5, R / 2\) or \(1, 5"),
    ((Q, K, COS, COS.expand(3, 5, 4)), {}, ValueError, r"sin has shape \(3, 5, 4\)"),
    ((Q, K, COS, COS.expand(2, 5, 4)), {}, ValueError, r"sin has shape \(2, 5, 4\) .* it must have those of"),
    ((Q, K, COS.half(), COS), {}, TypeError, "cos has dtype torch.float16; allowed are that of query"),
    ((Q.half(), K.half(), COS.half(), COS), {}, ValueError, "sin has .* dtype torch.float32; it must have"),
    ((Q, K, COS.to("meta"), COS), {}, ValueError, "cos is on meta"),
    ((Q, K, COS, COS), {"rotary_dim": 5}, ValueError, "rotary_dim=5 is out of range; allowed are even"),
    ((Q, K, COS, COS), {"rotary_dim": 0}, ValueError, "rotary_dim=0 is out of range"),
    ((Q, K, torch.zeros(1, 5, 6), torch.zeros(1, 5, 6)), {"rotary_dim": 12},
     ValueError, "cos has 6 angles a position; allowed are 1 to D / 2, 4"),
    ((Q[..., :7], K[..., :7], COS[..., :3], COS[..., :3]), {},
     ValueError, "an even R = rotary_dim, which is 7"),
    ((Q, K, COS.clone().requires_grad_(), COS), {}, ValueError, r"cos requires grad, .* pass cos.detach\(\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    "args, options, kind, message", BAD, ids=[f"{i}: {b[3][:40]}" for i, b in enumerate(BAD)]
)
def test_bad_arguments(
    args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        bk.rotary(*args, **options)


def test_bad_arguments_of_the_raw_operator() -> None:
    with pytest.raises(ValueError, match="cos has 8 angles a position; allowed are 1 to D / 2, 4"):
        torch.ops.bigmodel.rotary(Q, K, torch.zeros(1, 5, 8), torch.zeros(1, 5, 8))
