"""flash-attention's functions on our operators, against its documentation written out in float64."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.compat import flash_attn as fa
from bigmodel_kernels.compat.flash_attn import bert_padding

BACKENDS = ["reference", *([] if _native.reason() else ["native"])]
#: None is the order of the table, for calls of more than one operator
ORDERS = ["reference", None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and probabilities of (batch, seqlen, heads, headdim), in any dtype."""
    rows, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    )
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    i, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(q.shape[0], -1).to(logits.dtype)
        logits = logits - slopes[:, :, None, None] * (i - j).abs()
    left, right = window_size
    if causal:
        right = 0
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (j < i - left)
    if right >= 0:
        hidden = hidden | (j > i + right)
    logits = logits.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    blind = (lse == -torch.inf)[..., None]
    weights = torch.softmax(logits.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.masked_fill(lse == -torch.inf, torch.inf), weights


def agree(ours: Tensor, eager: Tensor, exact: Tensor, kind: str = "forward") -> None:
    assert ours.shape == exact.shape
    verdict = verify.compare(ours.detach(), eager.detach(), exact.detach(), kind)
    # The operators are held to the limits by their own tests. A few rows may be above them by chance.
    assert verdict.max_error <= 3 * verdict.max_limit and verdict.mean_error <= 3 * verdict.mean_limit, (
        verdict
    )


def compare(call: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
    """call(q, k, v) with its gradients, and its lse, against the formula; q, k and v are the leaves."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse, nothing = call(*leaves)
    upstream = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, leaves, upstream))
    results = []
    for dtype in (out.dtype, torch.float64):
        inside = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        expected, sums, _ = formula(*inside, **options)
        results.append((expected, *torch.autograd.grad(expected, inside, upstream.to(dtype))))
    for n, (got, eager, exact) in enumerate(zip(ours, *results, strict=True)):
        agree(got, eager, exact, "forward" if n == 0 else "gradient")
    torch.testing.assert_close(lse.double(), sums, atol=1e-4, rtol=1e-4)
    assert lse.dtype == torch.float32 and nothing.shape == (0,) and nothing.dtype == out.dtype


@st.composite
def options(draw: Any, batch: int, heads: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if draw(st.booleans()):
        chosen["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        chosen["window_size"] = (draw(st.integers(-1, 30)), draw(st.integers(-1, 30)))
    if draw(st.booleans()):
        chosen["softcap"] = draw(st.sampled_from([0.0, -1.0, 5.0]))
    if draw(st.booleans()):
        chosen["softmax_scale"] = draw(st.sampled_from([0.2, 1.0]))
    if draw(st.booleans()):
        size = (heads,) if draw(st.booleans()) else (batch, heads)
        chosen["alibi_slopes"] = torch.rand(size) * 0.3
    if draw(st.booleans()):
        chosen["deterministic"] = True
    return chosen


heads_of = st.sampled_from([(4, 4), (4, 2), (6, 1), (1, 1)])


@settings(max_examples=80)
@given(data=st.data(), heads=heads_of, dtype=st.sampled_from(DTYPES), backend=st.sampled_from(BACKENDS))
def test_dense_calls(data: Any, heads: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    batch, rows, keys = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dim = draw(st.sampled_from([1, 8, 17, 64, 256]))
    chosen = draw(options(batch, heads[0]))
    form = draw(st.sampled_from(["plain", "kv", "qkv", "heads first", "last dimension apart"]))
    if form == "qkv":
        heads, keys = (heads[0], heads[0]), rows
    q = torch.randn(batch, rows, heads[0], dim).to(dtype)
    k, v = (torch.randn(batch, keys, heads[1], dim).to(dtype) for _ in range(2))
    if form == "heads first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if form == "last dimension apart":
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if form == "kv":
            return fa.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **chosen, return_attn_probs=True)
        if form == "qkv":
            return fa.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **chosen, return_attn_probs=True)
        return fa.flash_attn_func(q, k, v, **chosen, return_attn_probs=True)

    with backends.use(backend):
        compare(call, q, k, v, chosen)
        out = call(q, k, v)[0]
        assert out.is_contiguous()
        if form == "plain":
            assert torch.equal(fa.flash_attn_func(q, k, v, **chosen), out)


@settings(max_examples=60)
@given(data=st.data(), heads=heads_of, dtype=st.sampled_from(DTYPES), backend=st.sampled_from(BACKENDS))
def test_packed_calls(data: Any, heads: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    """Each sequence is a dense call; empty ones among them, and keys in shuffled pages."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    batch, dim = draw(st.integers(1, 4)), draw(st.sampled_from([8, 17, 64]))
    lengths = st.lists(st.integers(0, 30), min_size=batch, max_size=batch)
    rows, keys = draw(lengths), draw(lengths)
    form = draw(st.sampled_from(["plain", "kv", "qkv", "pages"]))
    if form == "qkv":
        heads, keys = (heads[0], heads[0]), rows
    chosen = draw(options(batch, heads[0]))
    q = torch.randn(sum(rows), heads[0], dim).to(dtype)
    k, v = (torch.randn(sum(keys), heads[1], dim).to(dtype) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (rows, keys))
    extra = draw(st.integers(0, 3))
    place = (cu_q, cu_k, max(rows) + extra, max(keys) + extra)
    size = draw(st.sampled_from([1, 4, 16]))
    table = torch.randperm(batch * 30 + 2)[: batch * 30].view(batch, 30).to(torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if form == "kv":
            kv = torch.stack([k, v], 1)
            return fa.flash_attn_varlen_kvpacked_func(q, kv, *place, **chosen, return_attn_probs=True)
        if form == "qkv":
            qkv = torch.stack([q, k, v], 1)
            return fa.flash_attn_varlen_qkvpacked_func(qkv, cu_q, place[2], **chosen, return_attn_probs=True)
        more = {}
        if form == "pages":
            k, v, more = pages(k), pages(v), {"block_table": table}
        return fa.flash_attn_varlen_func(q, k, v, *place, **chosen, return_attn_probs=True, **more)

    def pages(packed: Tensor) -> Tensor:
        whole = packed.new_full((batch * 30 + 2, size, heads[1], dim), math.nan)
        sequence = torch.repeat_interleave(torch.arange(batch), torch.tensor(keys))
        at = torch.arange(sum(keys)) - cu_k[sequence]
        return whole.index_put((table[sequence, at // size].long(), at % size), packed)

    with backends.use(backend):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, lse, _ = call(*leaves)
        assert lse.shape == (heads[0], sum(rows))
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, upstream)
    results = []
    for kind in (dtype, torch.float64):
        inside = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        parts = []
        for b in range(batch):
            one_q = inside[0][cu_q[b] : cu_q[b + 1]][None]
            one_k, one_v = (t[cu_k[b] : cu_k[b + 1]][None] for t in inside[1:])
            slopes = chosen.get("alibi_slopes")
            if slopes is not None and slopes.dim() == 2:
                slopes = slopes[b]
            parts.append(formula(one_q, one_k, one_v, **{**chosen, "alibi_slopes": slopes}))
        expected, sums = torch.cat([p[0][0] for p in parts]), torch.cat([p[1][0] for p in parts], -1)
        results.append((expected, *torch.autograd.grad(expected, inside, upstream.to(kind))))
    for n, (got, eager, exact) in enumerate(zip((out, *grads), *results, strict=True)):
        agree(got, eager, exact, "forward" if n == 0 else "gradient")
    torch.testing.assert_close(lse.double(), sums, atol=1e-4, rtol=1e-4)


def test_a_query_that_sees_nothing() -> None:
    """seqlen_q > seqlen_k and causal: the picture of flash-attention's documentation."""
    q, k, v = torch.randn(1, 5, 1, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    out, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[0, :3] == 0).all() and (lse[0, 0, :3] == torch.inf).all()
    torch.testing.assert_close(out[0, 3], v[0, 0])
    assert torch.isfinite(lse[0, 0, 3:]).all()
    out, lse, _ = fa.flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert (out == 0).all() and (lse == torch.inf).all()


def test_arguments_by_place() -> None:
    """In the order of flash-attention: dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, return_attn_probs."""
    q, k, v = torch.randn(3, 2, 9, 4, 8)
    slopes = torch.rand(4)
    given = (0.0, 0.3, True, (4, -1), 2.0, slopes, False, False)
    expected = formula(q, k, v, 0.3, True, (4, -1), 2.0, slopes)[0]
    cu = int32(0, 9, 18)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    outs = [
        fa.flash_attn_func(q, k, v, *given),
        fa.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), *given),
        fa.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), *given),
        fa.flash_attn_varlen_func(*flat, cu, cu, 9, 9, *given, None),
        fa.flash_attn_varlen_kvpacked_func(flat[0], torch.stack(flat[1:], 1), cu, cu, 9, 9, *given),
        fa.flash_attn_varlen_qkvpacked_func(torch.stack(flat, 1), cu, 9, *given),
        fa.flash_attn_with_kvcache(
            *(q, k, v, None, None, None, None, None, None, None, None, 0.3, True, (4, -1), 2.0),
            *(True, slopes, 0, False),
        ),
    ]
    for out in outs:
        torch.testing.assert_close(out.view_as(expected), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_dropout_and_the_probabilities(packed: bool, heads: int) -> None:
    """S_dmask says exactly what was dropped; gradients are those of these probabilities."""
    p, slopes = 0.4, torch.rand(2, 4)
    q, k, v = torch.randn(2, 11, 4, 8), torch.randn(2, 13, heads, 8), torch.randn(2, 13, heads, 8)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    chosen: dict[str, Any] = {"causal": True, "window_size": (6, -1), "softcap": 3.0, "alibi_slopes": slopes}
    torch.manual_seed(3)
    if packed:
        place = (int32(0, 11, 22), int32(0, 13, 26), 12, 14)
        flat = [t.flatten(0, 1) for t in leaves]
        out, _, dmask = fa.flash_attn_varlen_func(*flat, *place, p, **chosen, return_attn_probs=True)
        assert (
            dmask.shape == (2, 4, 12, 14) and (dmask[:, :, 11:] == 0).all() and (dmask[..., 13:] == 0).all()
        )
        out, dmask = out.view(2, 11, 4, 8), dmask[:, :, :11, :13]
    else:
        out, _, dmask = fa.flash_attn_func(*leaves, p, **chosen, return_attn_probs=True)
    weights = formula(*leaves, **chosen)[2]
    torch.testing.assert_close(dmask.abs(), weights)
    kept = (dmask >= 0) & ~torch.signbit(dmask)
    assert 0.4 < kept[weights > 0].float().mean() < 0.8
    values = v.repeat_interleave(4 // heads, 2)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights * kept / (1 - p), values)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )
    torch.manual_seed(3)
    again = (
        fa.flash_attn_varlen_func(*flat, *place, p, **chosen)
        if packed
        else fa.flash_attn_func(*leaves, p, **chosen)
    )
    assert torch.equal(again.view_as(out), out)


def test_double_and_the_gradient_of_lse() -> None:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 6, 2, 4, dtype=torch.float64).unbind())

    def function(*tensors: Tensor) -> Any:
        return fa.flash_attn_func(*tensors, causal=True, return_attn_probs=True)[:2]

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_compiled_and_under_autocast() -> None:
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 9, 4, 8).unbind())

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.flash_attn_func(q, k, v, causal=True, window_size=(4, -1)) * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected, out = block(q, k, v), compiled(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(q, k, v).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------
# the cache


def turned(x: Tensor, cos: Tensor, sin: Tensor, places: Tensor, interleaved: bool) -> Tensor:
    """x (batch, n, heads, headdim) by the definition of rotary embedding, at places (batch, n)."""
    half = cos.shape[-1]
    cos, sin = cos[places][:, :, None], sin[places][:, :, None]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


@settings(max_examples=150)
@given(data=st.data(), heads=heads_of, dtype=st.sampled_from(DTYPES), backend=st.sampled_from(ORDERS))
def test_the_cache(data: Any, heads: tuple[int, int], dtype: torch.dtype, backend: str | None) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    batch, dim, rows = draw(st.integers(1, 4)), draw(st.sampled_from([8, 17, 32])), draw(st.integers(1, 6))
    form = draw(st.sampled_from(["plain", "indexed", "leftpad", "leftpad indexed", "pages", "view"]))
    size, blocks = draw(st.sampled_from([1, 4, 8])), draw(st.integers(2, 6))
    room = 8 * blocks
    new = draw(st.sampled_from([0, rows, draw(st.integers(1, 6))]))
    lengths = draw(st.lists(st.integers(0, room - max(new, rows)), min_size=batch, max_size=batch))
    as_int = draw(st.integers(0, 3)) == 0
    if as_int:
        lengths = lengths[:1] * batch
    chosen = draw(options(batch, heads[0]))
    chosen.pop("deterministic", None)
    chosen["num_splits"] = draw(st.integers(0, 3))
    q = torch.randn(batch, rows, heads[0], dim).to(dtype)
    k, v = (torch.randn(batch, new, heads[1], dim).to(dtype) for _ in range(2))
    held = [torch.randn(batch, room, heads[1], dim).to(dtype) for _ in range(2)]

    # Where the cache of each sequence lies, and what must not change is NaN.
    rows_of = torch.randperm(batch + 2)[:batch]
    kwargs: dict[str, Any] = {}
    if form == "pages":
        table = torch.randperm(batch * room // size + 3)[: batch * room // size].view(batch, -1)
        caches = []
        for tensor in held:
            pages = tensor.new_full((batch * room // size + 3, size, heads[1], dim), math.nan)
            pages[table] = tensor.view(batch, room // size, size, heads[1], dim)
            caches.append(pages)
        kwargs["block_table"] = table.to(torch.int32)
    elif form.endswith("indexed"):
        caches = [t.new_full((batch + 2, *t.shape[1:]), math.nan) for t in held]
        for cache, tensor in zip(caches, held, strict=True):
            cache[rows_of] = tensor
        kwargs["cache_batch_idx"] = rows_of.to(torch.int32)
    elif form == "view":  # heads before places, as many models keep their caches
        caches = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in held]
    else:
        caches = [t.clone() for t in held]
    starts = [0] * batch
    if form.startswith("leftpad"):
        starts = [draw(st.integers(0, max(0, n - 1))) for n in lengths]
        kwargs["cache_leftpad"] = int32(*starts)
    if new:
        kwargs.update(k=k, v=v)
    if new and draw(st.booleans()):
        half = draw(st.integers(1, dim // 2))
        angles = torch.rand(room + draw(st.integers(0, 3)), half) * 6
        kind = draw(st.sampled_from([dtype, torch.float32]))
        kwargs.update(rotary_cos=angles.cos().to(kind), rotary_sin=angles.sin().to(kind))
        kwargs["rotary_interleaved"] = draw(st.booleans())
    before = [c.clone() for c in caches]
    with backends.use(backend):
        out, lse = fa.flash_attn_with_kvcache(
            q,
            *caches,
            cache_seqlens=lengths[0] if as_int else int32(*lengths),
            return_softmax_lse=True,
            **kwargs,
            **chosen,
        )

    window = chosen.get("window_size", (-1, -1))
    advance = chosen.get("causal") or window[0] >= 0 or window[1] >= 0
    q_places = torch.tensor(lengths)[:, None] + (
        torch.arange(rows) if advance else torch.zeros(rows, dtype=int)
    )
    k_places = torch.tensor(lengths)[:, None] + torch.arange(new)
    results = []
    for kind in (dtype, torch.float64):
        q_, k_, v_, *held_ = (t.to(kind) for t in (q, k, v, *held))
        if "rotary_cos" in kwargs:
            angle = [kwargs[name].to(kind) for name in ("rotary_cos", "rotary_sin")]
            q_ = turned(q_, *angle, q_places, kwargs["rotary_interleaved"])
            k_ = turned(k_, *angle, k_places, kwargs["rotary_interleaved"])
        parts = []
        for b, n in enumerate(lengths):
            whole = [torch.cat([h[b, starts[b] : n], t[b]]) for h, t in zip(held_, (k_, v_), strict=True)]
            slopes = chosen.get("alibi_slopes")
            slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
            given = {**chosen, "alibi_slopes": slopes}
            parts.append(formula(q_[b : b + 1], *(t[None] for t in whole), **given))
        results.append((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), k_))
    assert out.is_contiguous() and out.dtype == dtype and lse.dtype == torch.float32
    (eager, _, eager_k), (exact, sums, exact_k) = results
    if "rotary_cos" not in kwargs:
        agree(out, eager, exact)
    else:  # turning rounds keys to the dtype of the cache on the way
        bound = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
        torch.testing.assert_close(out.double(), exact, atol=bound, rtol=bound)
    if dtype == torch.float32:
        torch.testing.assert_close(lse.double(), sums, atol=1e-3, rtol=1e-3)

    # The cache holds the new tokens where they belong, and is otherwise as it was.
    for n, (cache, old) in enumerate(zip(caches, before, strict=True)):
        for b, length in enumerate(lengths):
            for t in range(new):
                at: Any = (b, length + t)
                if form == "pages":
                    at = (int(table[b, at[1] // size]), at[1] % size)
                elif form.endswith("indexed"):
                    at = (int(rows_of[b]), at[1])
                if n == 1:
                    assert torch.equal(cache[at], v[b, t])
                else:
                    agree(cache[at], eager_k[b, t], exact_k[b, t]) if dtype == torch.float32 else None
                    torch.testing.assert_close(cache[at].double(), exact_k[b, t], atol=0.02, rtol=0.02)
                cache[at] = old[at]
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


def test_a_full_cache_and_a_step_after_the_other() -> None:
    """Generation token by token is causal attention to the whole."""
    q, k, v = torch.randn(3, 2, 12, 4, 16).unbind()
    expected = formula(q, k, v, causal=True)[0]
    caches = torch.full((2, 2, 16, 4, 16), math.nan)
    lengths = int32(0, 0)
    outs = []
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
        part = slice(begin, end)
        outs.append(
            fa.flash_attn_with_kvcache(
                q[:, part], *caches, k[:, part], v[:, part], cache_seqlens=lengths, causal=True
            )
        )
        lengths = lengths + (end - begin)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    assert caches[:, :, 12:].isnan().all()
    out = fa.flash_attn_with_kvcache(q, k, v, causal=True)
    torch.testing.assert_close(out, expected)


def test_the_cache_has_no_gradient_and_says_so() -> None:
    q, k, v = torch.randn(3, 1, 3, 2, 16).unbind()
    caches = torch.zeros(2, 1, 8, 2, 16)
    angles = torch.rand(8, 4)
    with pytest.raises(NotImplementedError, match="no gradient"):
        fa.flash_attn_with_kvcache(
            q.requires_grad_(), *caches, k, v, angles.cos(), angles.sin(), cache_seqlens=0
        ).sum().backward()
    caches = [c.clone().requires_grad_() for c in caches]
    with torch.no_grad():
        fa.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=2)
    assert torch.equal(caches[0][:, 2:5], k)


# ------------------------------------------------------------------------------------------------------------
# what is refused

X = torch.randn(2, 9, 4, 8)
C = torch.randn(2, 16, 4, 8)
CU = int32(0, 9, 18)
DENSE, PACKED, CACHE = fa.flash_attn_func, fa.flash_attn_varlen_func, fa.flash_attn_with_kvcache
REFUSED: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], str]] = {
    "rank": (DENSE, (X[0], X, X), {}, r"q has shape \(9, 4, 8\)"),
    "headdim": (DENSE, tuple(torch.randn(3, 1, 2, 1, 257)), {}, "headdim 257; allowed"),
    "k headdim": (DENSE, (X, X[..., :4], X[..., :4]), {}, "k has headdim 4"),
    "v shape": (DENSE, (X, X, X[..., :4]), {}, r"v has shape \(2, 9, 4, 4\)"),
    "heads": (DENSE, (X, X[:, :, :3], X[:, :, :3]), {}, "k has 3 heads"),
    "batch": (DENSE, (X, X[:1], X[:1]), {}, "k has batch 1"),
    "dropout": (DENSE, (X, X, X, 1.0), {}, "dropout_p=1.0"),
    "window": (DENSE, (X, X, X), {"window_size": 3}, "window_size=3"),
    "window of three": (DENSE, (X, X, X), {"window_size": (1, 2, 3)}, "window_size="),
    "softcap": (DENSE, (X, X, X), {"softcap": math.inf}, "softcap=inf"),
    "scale": (DENSE, (X, X, X, 0.0, math.nan), {}, "softmax_scale=nan"),
    "alibi": (DENSE, (X, X, X), {"alibi_slopes": torch.rand(3)}, r"alibi_slopes has shape \(3,\)"),
    "kv": (fa.flash_attn_kvpacked_func, (X, X), {}, "kv has shape"),
    "qkv": (fa.flash_attn_qkvpacked_func, (torch.randn(2, 9, 2, 4, 8),), {}, "qkv has shape"),
    "packed rank": (PACKED, (X, X, X, CU, CU, 9, 9), {}, "q has shape"),
    "too short": (PACKED, (*[X.flatten(0, 1)] * 3, CU, CU, 8, 9), {}, "max_seqlen_q=8"),
    "cu end": (PACKED, (*[X.flatten(0, 1)[:17]] * 3, CU, CU, 9, 9), {}, "cu_seqlens_q ends"),
    "few pages": (
        PACKED,
        (X.flatten(0, 1), C, C, CU, CU, 9, 9),
        {"block_table": torch.zeros(2, 0, dtype=torch.int32)},
        "block_table has 0 pages",
    ),
    "overflow": (CACHE, (X, C, C, X, X), {"cache_seqlens": 8}, "cache_seqlens=8; allowed are 0 to 7"),
    "overflow of one": (
        CACHE,
        (X, C, C, X, X),
        {"cache_seqlens": int32(7, 8)},
        "cache_seqlens holds 8",
    ),
    "no lengths": (CACHE, (X, C, C, X, X), {}, "cache_seqlens is None"),
    "k alone": (CACHE, (X, C, C, X), {"cache_seqlens": 1}, "v is None with k"),
    "k shape": (CACHE, (X, C, C, X[:1], X[:1]), {"cache_seqlens": 1}, "k has shape"),
    "v length": (CACHE, (X, C, C, X, X[:, :5]), {"cache_seqlens": 1}, "v has shape"),
    "cache batch": (CACHE, (X[:1], C, C), {}, "k_cache has batch 2"),
    "cache row": (CACHE, (X, C, C), {"cache_batch_idx": int32(0, 2)}, "cache_batch_idx holds 2"),
    "index and pages": (
        CACHE,
        (X, C, C),
        {"cache_batch_idx": int32(0, 1), "block_table": int32(0, 1)[:, None]},
        "cache_batch_idx has shape",
    ),
    "leftpad and pages": (
        CACHE,
        (X, C, C),
        {"cache_leftpad": int32(0, 1), "block_table": int32(0, 1)[:, None]},
        "cache_leftpad has shape",
    ),
    "leftpad": (
        CACHE,
        (X, C, C),
        {"cache_leftpad": int32(0, 5), "cache_seqlens": 4},
        "cache_leftpad=",
    ),
    "page": (
        CACHE,
        (X, C, C, X, X),
        {"block_table": int32(0, 2)[:, None], "cache_seqlens": 1},
        r"block_table holds 2; allowed are 0 to 1",
    ),
    "page of what is held": (
        CACHE,
        (X[:, :1], C[:, :4], C[:, :4], X[:, :1], X[:, :1]),
        {"block_table": torch.tensor([[0, 1], [7, 1]], dtype=torch.int32), "cache_seqlens": 4},
        "block_table holds 7",
    ),
    "page before the first": (
        CACHE,
        (X, C, C, X, X),
        {"block_table": int32(0, -1)[:, None], "cache_seqlens": 1},
        r"block_table holds -1; allowed are 0 to 1",
    ),
    "angles alone": (
        CACHE,
        (X, C, C),
        {"rotary_cos": C[0, :, 0], "rotary_sin": C[0, :, 0]},
        "rotary_cos is given",
    ),
    "no sines": (
        CACHE,
        (X, C, C, X, X, torch.ones(16, 4)),
        {"cache_seqlens": 0},
        "rotary_sin is None",
    ),
    "few angles": (
        CACHE,
        (X, C, C, X, X, *torch.ones(2, 15, 4)),
        {"cache_seqlens": 0},
        "15 places",
    ),
    "angles beyond": (
        CACHE,
        (X, C, C, X[:, :1], X[:, :1], *torch.ones(2, 16, 4)),
        {"cache_seqlens": 15, "causal": True},
        "of q, 24",
    ),
    "wide angles": (
        CACHE,
        (X, C, C, X, X, *torch.ones(2, 16, 5)),
        {"cache_seqlens": 0},
        "rotary_cos has shape",
    ),
    "apart": (CACHE, (X, C.mT.contiguous().mT, C), {}, "k_cache has stride"),
    "slopes of a cache": (
        CACHE,
        (X, C, C, X, X),
        {"cache_seqlens": 0, "alibi_slopes": torch.rand(2)},
        "alibi_slopes has shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument_and_leave_the_cache_alone(name: str) -> None:
    function, args, kwargs, message = REFUSED[name]
    before = C.clone()
    with pytest.raises(ValueError, match=message):
        function(*args, **kwargs)
    assert torch.equal(C, before)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "name"),
    [
        (fa.flash_attn_func, (X.int(), X, X), {}, "q"),
        (fa.flash_attn_func, (X, X.double(), X), {}, "k"),
        (fa.flash_attn_varlen_func, (*[X.flatten(0, 1)] * 3, CU.long(), CU, 9, 9), {}, "cu_seqlens_q"),
        (fa.flash_attn_with_kvcache, (X, C, C.half()), {}, "v_cache"),
        (fa.flash_attn_with_kvcache, (X, C, C, X.half(), X), {"cache_seqlens": 0}, "k"),
        (fa.flash_attn_with_kvcache, (X, C, C), {"cache_seqlens": int32(1, 2).long()}, "cache_seqlens"),
        (fa.flash_attn_func, (X, X, X), {"alibi_slopes": torch.rand(4).half()}, "alibi_slopes"),
    ],
)
def test_errors_of_dtypes(function: Any, args: Any, kwargs: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} has dtype"):
        function(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (fa.flash_attn_func, (1, X, X), "q=1 is of type int; it must be Tensor"),
        (fa.flash_attn_kvpacked_func, (X, None), "kv=None is of type NoneType; it must be Tensor"),
        (
            fa.flash_attn_varlen_func,
            (*[X.flatten(0, 1)] * 3, CU, CU, 9, None),
            "max_seqlen_k=None is of type NoneType; it must be int",
        ),
    ],
)
def test_arguments_of_another_type_are_named(function: Any, args: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        function(*args)


# ------------------------------------------------------------------------------------------------------------
# padding


@given(data=st.data())
def test_padding_and_back(data: Any) -> None:
    draw = data.draw
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    mask = torch.tensor(
        draw(
            st.lists(
                st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch
            )
        )
    )
    unused = torch.rand(batch, length) < 0.3 if draw(st.booleans()) else None
    kept = mask if unused is None else mask | unused
    kind = draw(st.sampled_from([torch.bool, torch.int64, torch.int32]))
    if unused is not None:
        unused = (unused & ~mask).to(kind)
    hidden = torch.randn(batch, length, *draw(st.sampled_from([(5,), (3, 2)])), requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = fa.unpad_input(hidden, mask.to(kind), unused)
    lengths = kept.sum(-1)
    assert torch.equal(tokens, hidden[kept]) and torch.equal(indices, kept.flatten().nonzero()[:, 0])
    assert cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()] and cu_seqlens.dtype == torch.int32
    assert longest == int(lengths.max()) and used.tolist() == mask.sum(-1).tolist()
    back = fa.pad_input(tokens, indices, batch, length)
    assert torch.equal(back, hidden * kept.view(batch, length, *(1,) * (hidden.dim() - 2)))
    upstream = torch.randn_like(back)
    back.backward(upstream)
    assert torch.equal(hidden.grad, upstream * kept.view(batch, length, *(1,) * (hidden.dim() - 2)))


def test_rows_by_index() -> None:
    rows = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 4])
    assert torch.equal(fa.index_first_axis(rows, indices), rows[indices])
    assert torch.autograd.gradcheck(lambda x: fa.index_first_axis(x, indices), rows)
    assert bert_padding.index_put_first_axis(rows[:2], indices[:2], 6)[[0, 4]].equal(rows[[1, 0]])
    with pytest.raises(ValueError, match="input has shape"):
        fa.index_first_axis(rows[:, 0, 0], indices)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        fa.unpad_input(rows, torch.ones(5, 2))
    with pytest.raises(ValueError, match="indices"):
        fa.pad_input(rows, indices, 2, 3)


def test_sequences_that_share_a_row() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    hidden = torch.randn(3, 6, 4)
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        hidden, lengths
    )
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert torch.equal(tokens, torch.cat([hidden[0, :5], hidden[1, :5], hidden[2]]))
    assert torch.equal(fa.pad_input(tokens, indices, 3, 6)[0, :5], hidden[0, :5])


# ------------------------------------------------------------------------------------------------------------
# the name


def test_the_name_is_taken_on_request_and_given_back() -> None:
    assert "flash_attn" not in sys.modules
    fa.uninstall()
    fa.install()
    try:
        fa.install()
        import flash_attn
        from flash_attn import flash_attn_func
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_func

        assert flash_attn is fa and flash_attn_func is fa.flash_attn_func
        assert (pad_input, unpad_input) == (fa.pad_input, fa.unpad_input)
        assert flash_attn_varlen_func is fa.flash_attn_varlen_func
        assert importlib.util.find_spec("flash_attn") is not None
    finally:
        fa.uninstall()
    assert not [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


def test_another_package_of_the_name_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="package of its own"):
        fa.install()
    monkeypatch.setitem(sys.modules, "flash_attn", sys)
    with pytest.raises(RuntimeError, match="package of its own"):
        fa.install()
    fa.uninstall()
    assert sys.modules["flash_attn"] is sys
