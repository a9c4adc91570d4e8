"""Statistics and probabilities of attention: against float64, their properties, memory, and how torch sees
them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import operator_checks as checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.bench import memory
from bigmodel_kernels.bench.timing import Contender
from bigmodel_kernels.ops.attention_maps import prepare, prepare_probabilities, reference


def whole(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities (B, H, Sq, Sk) in the dtype of query by their definition, and which keys are visible."""
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    logits = (
        query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    )
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    i, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(logits.dtype)[..., None, None] * (i - j).abs()
    visible = torch.ones(query.shape[0], heads, rows, keys, dtype=torch.bool)
    left, right = window or (None, None)
    if is_causal:
        right = 0
    if left is not None:
        visible &= j >= i - left
    if right is not None:
        visible &= j <= i + right
    if key_padding_mask is not None:
        visible &= key_padding_mask[:, None, None]
    if query_padding_mask is not None:
        visible &= query_padding_mask[:, None, :, None]
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    return torch.softmax(logits, -1).nan_to_num(0.0)[..., :keys] * visible.to(logits.dtype), visible


def statistics(query: Tensor, key: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Entropy and mass by their definition."""
    p, _ = whole(query, key, **options)
    entropy = torch.special.entr(p).sum(-1)
    if options.get("sinks") is not None:
        counted = options.get("query_padding_mask")
        rest = (1 - p.sum(-1)).clamp(0, 1)
        entropy = entropy + torch.special.entr(rest if counted is None else rest * counted[:, None])
    return entropy, p.sum(2)


def masks(**changes: Any) -> dict[str, Any]:
    padding = torch.rand(2, 37) > 0.3
    return {"key_padding_mask": padding, **changes}


FEATURES: dict[str, Any] = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "window": lambda: {"window": (5, 3)},
    "padding": masks,
    "causal, window and padding": lambda: masks(is_causal=True, window=(9, None)),
    "queries that do not count": lambda: {"query_padding_mask": torch.rand(2, 29) > 0.5},
    "bias": lambda: {"bias": torch.randn(1, 4, 29, 37)},
    "bias of a head": lambda: {"bias": torch.randn(4, 1, 37)},
    "softcap and scale": lambda: {"softcap": 2.0, "softmax_scale": 0.7},
    "ALiBi": lambda: {"alibi_slopes": torch.rand(4), "is_causal": True},
    "ALiBi of each sequence": lambda: {"alibi_slopes": torch.rand(2, 4)},
    "sinks": lambda: masks(sinks=torch.randn(4), is_causal=True),
}


@pytest.fixture(params=["chosen", "one tile", "tiles"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs by itself; plain PyTorch; and that in blocks of 8 rows with tiles of 5 keys, so that small
    shapes have many of both."""
    if request.param == "tiles":
        monkeypatch.setattr(reference, "_TILE_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(reference, "_FEWEST_KEYS", 5)
    with backends.use(None if request.param == "chosen" else "reference"):
        yield


def compare(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The numerics rule; in float64, whose reference has no error, equality but for rounding."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, exact)
        return
    verdict = verify.compare(got, eager, exact)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.usefixtures("tiled")
def test_against_float64(feature: str, dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 29, 16).to(dtype) * 2, torch.randn(2, 2, 37, 16).to(dtype)
    options = FEATURES[feature]()
    exact, _ = whole(query.double(), key.double(), **options)
    statistic_type = torch.float64 if dtype == torch.float64 else torch.float32
    with verify.poisoned():
        p = bk.attention_probabilities(query, key, **options)
        found = bk.attention_statistics(query, key, top_k=3, **options)
    assert p.dtype == dtype and found.entropy.dtype == found.mass.dtype == statistic_type
    eager, _ = whole(query.to(statistic_type), key.to(statistic_type), **options)
    compare(p, eager.to(dtype), exact)
    references = statistics(query.double(), key.double(), **options)
    eagers = statistics(query.to(statistic_type), key.to(statistic_type), **options)
    for got, of_eager, ref in zip(found[:2], eagers, references, strict=True):
        compare(got, of_eager, ref)
    # The keys named have the probabilities named, and those are the largest.
    best, _ = exact.topk(3, -1)
    torch.testing.assert_close(found.top_probabilities.double(), best, atol=1e-5, rtol=1e-4)
    there = found.top_keys >= 0
    named = exact.gather(-1, found.top_keys.clamp_min(0)).masked_fill(~there, 0.0)
    torch.testing.assert_close(found.top_probabilities.double(), named, atol=1e-5, rtol=1e-4)


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    rows=st.integers(0, 21),
    keys=st.integers(0, 21),
    dim=st.integers(1, 9),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
    padded=st.booleans(),
    counted=st.booleans(),
    sink=st.booleans(),
    top_k=st.integers(0, 25),
    backend=st.sampled_from(["native", "one tile", "small tiles"]),
    scale=st.sampled_from([0.3, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_properties(
    batch: int,
    kv_heads: int,
    group: int,
    rows: int,
    keys: int,
    dim: int,
    causal: bool,
    window: Any,
    padded: bool,
    counted: bool,
    sink: bool,
    top_k: int,
    backend: str,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    heads = kv_heads * group
    native = backend == "native" and _native.available()
    dtype = torch.float32 if native else torch.float64
    near = {"atol": 1e-3, "rtol": 1e-3} if native else {"atol": 1e-9, "rtol": 1e-9}
    query, key = (
        torch.randn(batch, heads, rows, dim, dtype=dtype),
        torch.randn(batch, kv_heads, keys, dim, dtype=dtype),
    )
    options: dict[str, Any] = {
        "is_causal": causal,
        "window": window,
        "softmax_scale": scale,
        "key_padding_mask": torch.rand(batch, keys) > 0.5 if padded else None,
        "query_padding_mask": torch.rand(batch, rows) > 0.5 if counted else None,
        "sinks": torch.randn(heads, dtype=dtype) if sink else None,
    }
    with pytest.MonkeyPatch.context() as patch:
        if backend == "small tiles":
            patch.setattr(reference, "_TILE_ELEMENTS", {"cpu": 1})
            patch.setattr(reference, "_FEWEST_KEYS", 4)
        p = bk.attention_probabilities(query, key, **options)
        found = bk.attention_statistics(query, key, top_k=top_k, **options)
    exact, visible = whole(query.double(), key.double(), **options)
    p = p.double()
    torch.testing.assert_close(p, exact, **near)
    torch.testing.assert_close(found.mass.double(), exact.sum(2), **near)
    seen = visible.sum(-1)
    assert (p[~visible] == 0).all()
    if not sink:
        torch.testing.assert_close(p.sum(-1), (seen > 0).double(), **near)
        torch.testing.assert_close(found.mass.double().sum(-1), (seen > 0).sum(-1).double(), **near)
    assert (p.sum(-1) <= 1 + (1e-6 if native else 1e-12)).all()
    choices = seen + sink
    assert (found.entropy <= choices.clamp_min(1).double().log() + near["atol"]).all()
    assert (found.entropy >= 0).all()
    assert (found.entropy[seen == 0] == 0).all()
    assert found.top_keys.shape == (batch, heads, rows, top_k)
    there = (p > 0).sum(-1, keepdim=True).clamp_max(top_k)
    assert torch.equal((found.top_keys >= 0).sum(-1, keepdim=True), there)
    assert (found.top_probabilities.diff(dim=-1) <= 0).all()
    for named in found.top_keys.flatten(0, 2):
        names = named[named >= 0].tolist()
        assert len(set(names)) == len(names) and all(name < keys for name in names)


def test_packed_is_each_sequence_alone() -> None:
    lengths_q, lengths_k = [3, 0, 7, 1], [5, 2, 7, 0]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    query, key = torch.randn(11, 4, 8), torch.randn(14, 2, 8)
    options: dict[str, Any] = {"is_causal": True, "sinks": torch.randn(4)}
    slopes = torch.rand(4, 4)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "alibi_slopes": slopes, **options}
    found = bk.attention_statistics(query, key, top_k=2, **packed)
    p = bk.attention_probabilities(query, key, **packed)
    assert found.entropy.shape == (4, 11) and found.mass.shape == (4, 14)
    assert found.top_keys.shape == (4, 11, 2) and p.shape == (4, 11, 7)
    for n in range(4):
        q, k = slice(*cu_q[n : n + 2].tolist()), slice(*cu_k[n : n + 2].tolist())
        one = (query[q].transpose(0, 1)[None], key[k].transpose(0, 1)[None])
        alone = bk.attention_statistics(*one, top_k=2, alibi_slopes=slopes[n], **options)
        of_n = (found.entropy[:, q], found.mass[:, k], found.top_keys[:, q], found.top_probabilities[:, q])
        for got, expected in zip(of_n, alone, strict=True):
            torch.testing.assert_close(got, expected[0])
        expected = bk.attention_probabilities(*one, alibi_slopes=slopes[n], **options)[0]
        torch.testing.assert_close(p[:, q, : lengths_k[n]], expected)
        assert (p[:, q, lengths_k[n] :] == 0).all()
    some = bk.attention_probabilities(query, key, heads=[3, 0], queries=[10, 2, 3, 4, -1], **packed)
    torch.testing.assert_close(some, p[[3, 0]][:, [10, 2, 3, 4, 10]])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.usefixtures("tiled")
def test_chosen_heads_and_queries(feature: str) -> None:
    query, key = torch.randn(2, 4, 29, 16), torch.randn(2, 2, 37, 16)
    options = FEATURES[feature]()
    p = bk.attention_probabilities(query, key, **options)
    heads, queries = [2, 0, -1, 2], [28, 5, 6, 7, 0, -2, 5]
    some = bk.attention_probabilities(query, key, heads=heads, queries=queries, **options)
    torch.testing.assert_close(some, p[:, heads][:, :, queries])
    torch.testing.assert_close(bk.attention_probabilities(query, key, heads=[1], **options), p[:, [1]])
    assert bk.attention_probabilities(query, key, heads=[], **options).shape == p[:, :0].shape
    assert bk.attention_probabilities(query, key, queries=[], **options).shape == (2, 4, 0, 37)


def test_the_probabilities_are_those_of_attention() -> None:
    query, key, value = torch.randn(3, 2, 4, 50, 32)
    options: dict[str, Any] = {"is_causal": True, "key_padding_mask": torch.rand(2, 50) > 0.2}
    out = bk.attention(query, key, value, **options)
    torch.testing.assert_close(bk.attention_probabilities(query, key, **options) @ value, out)


def test_equal_logits_are_known_in_closed_form() -> None:
    query, key = torch.zeros(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    found = bk.attention_statistics(query, key, is_causal=True)
    torch.testing.assert_close(found.entropy[0, 0], torch.arange(1, 7).log())
    expected = torch.tensor([sum(1 / n for n in range(first, 7)) for first in range(1, 7)])
    torch.testing.assert_close(found.mass[0, 0], expected)


def test_large_logits_stay_finite() -> None:
    query, key = 1e4 * torch.randn(1, 2, 9, 8), 1e4 * torch.randn(1, 2, 9, 8)
    found = bk.attention_statistics(query, key, top_k=2)
    assert found.entropy.isfinite().all() and found.mass.isfinite().all()
    assert math.isclose(found.mass.sum().item(), 18, rel_tol=1e-5)


def test_memory_of_the_statistics() -> None:
    """At S=4096 the probabilities of 4 heads are 268 MB; the statistics take less than a tenth of it."""
    query, key = torch.randn(2, 1, 4, 4096, 16)

    def run() -> Any:
        return bk.attention_statistics(query, key, top_k=4, is_causal=True)

    with checks.Sizes() as sizes:
        run()
    full = 4 * 4096 * 4096
    assert sizes.largest < full / 50
    held = memory.peak(Contender("statistics", run), "cpu")
    if held is not None:
        assert held < 4 * full / 10, f"{held / 1e6:.0f} MB"


CALLS: dict[str, dict[str, Any]] = {
    "dense": {"is_causal": True, "key_padding_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2])},
    "window, bias, sinks": {"window": (2, 1), "bias": torch.randn(4, 6, 5), "sinks": torch.randn(4)},
}


def operands(packed: bool = False) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    if not packed:
        return (torch.randn(2, 4, 6, 8), torch.randn(2, 2, 5, 8)), {}
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    return (torch.randn(6, 4, 8), torch.randn(6, 2, 8)), {"cu_seqlens_q": cu, "cu_seqlens_k": cu}


@pytest.mark.parametrize("kind", [*CALLS, "packed"])
def test_opcheck(kind: str) -> None:
    tensors, options = operands(kind == "packed")
    options.update(CALLS.get(kind, {}))
    torch.library.opcheck(
        torch.ops.bigmodel.attention_statistics.default, *prepare(*tensors, top_k=2, **options)
    )
    for chosen in ({}, {"heads": [3, 1], "queries": [0, 1, -1]}):
        torch.library.opcheck(
            torch.ops.bigmodel.attention_probabilities.default,
            *prepare_probabilities(*tensors, **chosen, **options),
        )


def test_compile_without_a_break() -> None:
    torch._dynamo.reset()
    (query, key), _ = operands()

    def function(q: Tensor, k: Tensor) -> Tensor:
        found = bk.attention_statistics(q, k, top_k=1, is_causal=True)
        p = bk.attention_probabilities(q, k, queries=[-1])
        return found.entropy.sum() + found.mass.sum() + p.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), function(query, key))


def test_vmap() -> None:
    query, key = torch.randn(3, 2, 4, 6, 8), torch.randn(2, 2, 5, 8)
    got = torch.vmap(lambda q: bk.attention_statistics(q, key, top_k=2))(query)
    each = [bk.attention_statistics(q, key, top_k=2) for q in query]
    for part, *parts in zip(got, *each, strict=True):
        torch.testing.assert_close(part, torch.stack(parts))
    p = torch.vmap(bk.attention_probabilities, in_dims=(0, None))(query, key)
    torch.testing.assert_close(p, torch.stack([bk.attention_probabilities(q, key) for q in query]))


def test_a_gradient_is_refused_in_words() -> None:
    (query, key), _ = operands()
    query.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"attention_statistics has no gradient.*query.detach\(\)"):
        bk.attention_statistics(query, key).entropy.sum().backward()
    with pytest.raises(NotImplementedError, match="attention_probabilities has no gradient"):
        bk.attention_probabilities(query, key).sum().backward()
    assert not bk.attention_statistics(query.detach(), key).entropy.requires_grad


@pytest.mark.parametrize("backend", [None, "native", "triton", "reference"])
def test_what_runs(backend: str | None) -> None:
    """There is no Triton kernel: forced, it leaves the choice as it is."""
    (query, key), _ = operands()
    if backend == "native" and not _native.available():
        pytest.skip(str(_native.reason()))
    expected = "native" if _native.available() and backend != "reference" else "reference"
    with backends.use(backend):
        assert bk.explain("attention_statistics", query, key, top_k=2).chosen == expected
        assert bk.explain("attention_probabilities", query, key, heads=[0]).chosen == expected
        bk.attention_statistics(query, key)


def test_more_top_keys_than_the_library_keeps() -> None:
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 90, 8)
    explained = bk.explain("attention_statistics", query, key, top_k=65)
    assert explained.chosen == "reference" and "top_k=65" in explained.reasons["native"]
    found = bk.attention_statistics(query, key, top_k=65)
    most = bk.attention_statistics(query, key, top_k=64)
    torch.testing.assert_close(found.top_probabilities[..., :64], most.top_probabilities)


def test_autocast_leaves_them_alone() -> None:
    (query, key), _ = operands()
    with torch.autocast("cpu", torch.bfloat16):
        p = bk.attention_probabilities(query, key)
        found = bk.attention_statistics(query, key)
    assert torch.equal(p, bk.attention_probabilities(query, key))
    assert torch.equal(found.entropy, bk.attention_statistics(query, key).entropy)


Q, K = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 5, 8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
BAD: list[tuple[tuple[Tensor, Tensor], dict[str, Any], type[Exception], str]] = [
    ((Q.int(), K), {}, TypeError, "query has dtype torch.int32"),
    ((Q, K.half()), {}, TypeError, "key has dtype torch.float16; it must have that of query"),
    ((Q, K[..., :4]), {}, ValueError, "key has head_dim 4; it must be that of query, 8"),
    ((Q, K[:1]), {}, ValueError, "key has batch 1; it must be that of query, 2"),
    ((Q[:, :3], K), {}, ValueError, "key has 2 heads; they must divide the 3 heads of query"),
    ((Q, K), {"window": (-1, 0)}, ValueError, "window="),
    ((Q, K), {"key_padding_mask": torch.ones(2, 6).bool()}, ValueError, "key_padding_mask has shape"),
    ((Q, K), {"query_padding_mask": torch.ones(2, 6)}, TypeError, "query_padding_mask has dtype torch.float"),
    ((Q, K), {"query_padding_mask": torch.ones(2, 5).bool()}, ValueError,
     r"query_padding_mask has shape \(2, 5\); it must be \(B, Sq\), \(2, 6\)"),
    ((Q[0].transpose(0, 1), K[0].transpose(0, 1)),
     {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "query_padding_mask": torch.ones(2, 6).bool()}, ValueError,
     "query_padding_mask has shape .* it must be None for packed"),
    ((Q[0].transpose(0, 1), K[0].transpose(0, 1)), {"cu_seqlens_q": CU, "cu_seqlens_k": CU}, ValueError,
     "cu_seqlens_k ends at 6; it must end at the number of rows, 5"),
]  # fmt: skip


@pytest.mark.parametrize("tensors, options, kind, message", BAD, ids=range(len(BAD)))
def test_bad_arguments(
    tensors: tuple[Tensor, Tensor], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for function in (bk.attention_statistics, bk.attention_probabilities):
        with pytest.raises(kind, match=message):
            function(*tensors, **options)


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match="top_k=-1 is negative; allowed are 0"):
        bk.attention_statistics(Q, K, top_k=-1)
    with pytest.raises(ValueError, match="heads has 4; allowed are -4 to 3"):
        bk.attention_probabilities(Q, K, heads=[0, 4])
    with pytest.raises(ValueError, match="queries has -7; allowed are -6 to 5"):
        bk.attention_probabilities(Q, K, queries=[-7])
