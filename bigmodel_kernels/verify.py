"""Are the kernels right? Every operator against float64, over shapes, types and features.

The rule: with `ref` the result in float64 and `eager` the same formula by plain PyTorch in the dtype under
test,

    max |out - ref|  <= 2   * max |eager - ref| + atol         (gradients: 3)
    mean |out - ref| <= 1.2 * mean |eager - ref|               (gradients: 1.5)

where atol is what rounding alone costs (twice the error of adding and taking away 0.3 in that dtype). Where
eager is nearer to ref than rounding is on average (a quarter of the distance of the dtype's numbers), as when
it happens to be exact, both lines take the latter. Mean and maximum of n errors are themselves
uncertain, so their limits are widened by three standard deviations of the ratio of two such numbers. For the
mean that is a part 3 / sqrt(n), and 1 + 2 / n times that, for the lower number may be far off where there are
few: nothing to speak of for a large tensor, and all for one of two elements. The maximum of n normal errors
is near sqrt(2 ln n) of their deviations and varies by pi / sqrt(6) / sqrt(2 ln n) of them (Gumbel's law),
which makes a part 3 * 1.81 / (2 ln n): a quarter for 20,000 elements, at most 1. Patched models
are held to the same rule (`bigmodel_kernels.models.rule`). Outputs are NaN before the call. The formulas here
are written for themselves, and share nothing with the kernels.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.ops.philox import keep_attention

FACTORS = {"forward": (2.0, 1.2), "gradient": (3.0, 1.5)}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


@dataclass(frozen=True)
class Verdict:
    """Errors of a result against float64, what was allowed, and the errors of plain PyTorch.

    `eager_max` and `eager_mean` leave out elements where plain PyTorch is not finite and should be.
    """

    ok: bool
    max_error: float
    max_limit: float
    mean_error: float
    mean_limit: float
    reason: str = ""
    eager_max: float = 0.0
    eager_mean: float = 0.0

    def __str__(self) -> str:
        text = f"max {self.max_error:.3g} (limit {self.max_limit:.3g}), mean {self.mean_error:.3g} "
        return text + f"(limit {self.mean_limit:.3g}){': ' + self.reason if self.reason else ''}"


def compare(
    out: Tensor,
    eager: Tensor,
    ref: Tensor,
    kind: str = "forward",
    negligible: float | None = None,
    chance: float = 0.0,
) -> Verdict:
    """Judges `out` by the rule at the top of this file.

    out, eager: of the same shape as ref, which is float64. kind: "forward" or "gradient". negligible: for
    numbers of any size, some of which are sums whose terms cancel: an error that counts for nothing, added to
    both limits, with the rounding of ref in the place of that of 0.3. chance: what both limits allow more,
    for few numbers whose errors depend on each other.

    Raises ValueError for another kind.
    """
    if kind not in FACTORS:
        raise ValueError(f"kind={kind!r} is unknown; allowed are {', '.join(FACTORS)}")
    if out.shape != ref.shape or eager.shape != ref.shape:
        shapes = f"out {tuple(out.shape)}, eager {tuple(eager.shape)}, ref {tuple(ref.shape)}"
        return Verdict(False, math.inf, 0.0, math.inf, 0.0, f"shapes differ: {shapes}")
    infinite = ~ref.isfinite()
    if not torch.equal(out[infinite].double(), ref[infinite].double()):
        return Verdict(False, math.inf, 0.0, math.inf, 0.0, "infinities are not where the reference has them")
    exact = ref[~infinite].double()
    if exact.numel() == 0:
        return Verdict(True, 0.0, 0.0, 0.0, 0.0)
    error, eager_error = (out[~infinite].double() - exact).abs(), (eager[~infinite].double() - exact).abs()
    rounded = exact.to(out.dtype)
    rounding = (rounded.double() - exact).abs()
    if negligible is None:
        atol = 2 * ((rounded + 0.3 - 0.3).double() - rounded.double()).abs().max().item()
    else:
        atol = rounding.max().item() + negligible
    max_factor, mean_factor = FACTORS[kind]
    max_error, mean_error = error.max().item(), error.mean().item()
    # An eager result that overflowed sets no limit that a kernel could be held to.
    eager_max, eager_mean = (
        eager_error.nan_to_num(0.0, 0.0).max().item(),
        eager_error.nan_to_num(0.0, 0.0).mean().item(),
    )
    count = exact.numel()
    largest_spread = 1 + min(1.0, 3 * math.pi / math.sqrt(3) / (2 * math.log(max(count, 2))))
    mean_spread = 1 + 3 / math.sqrt(count) * (1 + 2 / count)
    least = _mean_rounding(exact, out.dtype)
    max_limit = max_factor * largest_spread * max(eager_max, least) + max(atol, chance)
    mean_limit = mean_factor * mean_spread * max(eager_mean, least)
    mean_limit += max(negligible or 0.0, chance)
    ok = max_error <= max_limit and mean_error <= mean_limit  # false for NaN
    reason = "" if ok else "error above the limit"
    return Verdict(ok, max_error, max_limit, mean_error, mean_limit, reason, eager_max, eager_mean)


def _mean_rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """What rounding to a dtype costs on average: a quarter of the distance of its numbers. Of few numbers,
    what it has cost is as much chance as what it has not.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.clamp(info.min, info.max)).exponent - 1
    distance = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    return distance.clamp_min(info.tiny * info.eps).where(exact != 0, 0.0).mean().item() / 4


# The formulas, in the dtype of their arguments.


def attention_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    sequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention with the whole matrix of logits; output and logsumexp. `sequence`: the number of the first,
    for dropout.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        outs, sums = [query[:0]], [query.new_empty(query.shape[1], 0)]
        for n in range(len(q_ends) - 1):
            q, k = slice(q_ends[n], q_ends[n + 1]), slice(k_ends[n], k_ends[n + 1])
            parts = (query[q], key[k], value[k])
            out, logsumexp = attention_formula(
                *(t.transpose(0, 1)[None] for t in parts),
                is_causal=is_causal,
                softmax_scale=softmax_scale,
                window=window,
                softcap=softcap,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                alibi_slopes=alibi_slopes
                if alibi_slopes is None or alibi_slopes.dim() == 1
                else alibi_slopes[n : n + 1],
                sinks=sinks,
                sequence=n,
            )
            outs.append(out[0].transpose(0, 1))
            sums.append(logsumexp[0])
        return torch.cat(outs), torch.cat(sums, -1)
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    logits = query @ key.transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    i = torch.arange(rows, device=query.device)[:, None] + keys - rows
    j = torch.arange(keys, device=query.device)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes[..., None, None] * (i - j).abs()
    left, right = window or (None, None)
    visible = torch.ones(rows, keys, dtype=torch.bool, device=query.device)
    if is_causal:
        visible = visible & (j <= i)
    if left is not None:
        visible = visible & (j >= i - left)
    if right is not None:
        visible = visible & (j <= i + right)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None]
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks[None, :, None, None].to(logits.dtype).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    elif keys == 0:
        return value.new_zeros(query.shape) + query * 0, logits.new_full(query.shape[:3], -torch.inf)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    safe = logits.masked_fill(blind, 0.0)
    weights = torch.softmax(safe, -1)[..., :keys]
    if dropout_seed is not None:
        places = slice(0, rows), slice(0, keys)
        weights = weights * keep_attention(dropout_seed, dropout_p, sequence, heads, *places, weights)
    out = (weights.to(value.dtype) @ value).masked_fill(blind, 0.0)
    return out, torch.logsumexp(safe, -1).masked_fill(blind[..., 0], -torch.inf).to(query.dtype)


def attention_probabilities_formula(
    query: Tensor, key: Tensor, *, query_padding_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """The probabilities (B, H, Sq, Sk): attention whose values are the rows of the identity. No gradient."""
    keys = key.shape[2]
    rows = torch.eye(keys, dtype=key.dtype, device=key.device).expand(*key.shape[:3], keys)
    with torch.no_grad():
        p, _ = attention_formula(query, key, rows, **options)
    return p if query_padding_mask is None else p * query_padding_mask[:, None, :, None]


def attention_statistics_formula(
    query: Tensor, key: Tensor, *, top_k: int = 0, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, mass and the largest probabilities. No gradient."""
    p = attention_probabilities_formula(query, key, **options)
    return torch.special.entr(p).sum(-1), p.sum(2), p.topk(top_k, -1).values


def _activation(x: Tensor, name: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda t: t,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
        "relu": F.relu,
        "silu": F.silu,
    }
    return functions[name](x)


def layer_norm_formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    return F.layer_norm(x if residual is None else x + residual, x.shape[-1:], weight, bias, eps)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str = "layer_norm"
) -> Tensor:
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm_formula(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    return _norm(x if residual is None else x + residual, weight, None, eps, "rms_norm")


def linear_formula(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
) -> Tensor:
    w = torch.cat([w.t() if weight_layout == "conv1d" else w for w in weight])
    y = _activation(F.linear(x, w, None if bias is None else torch.cat(list(bias))), activation)
    if residual is not None:
        y = y + residual
    return y if norm_weight is None else _norm(y, norm_weight, norm_bias, norm_eps, norm_kind)


def feed_forward_formula(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    weight_layout: str = "linear",
    residual: Tensor | None = None,
    norm_position: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
) -> Tensor:
    if weight_layout == "conv1d":
        w_in, w_out, w_gate = w_in.t(), w_out.t(), None if w_gate is None else w_gate.t()
    h = _norm(x, norm_weight, norm_bias, norm_eps, norm_kind) if norm_position == "pre" else x
    up = F.linear(h, w_in, b_in)
    if w_gate is None:
        hidden = _activation(up, activation)
    else:
        hidden = _activation(F.linear(h, w_gate, b_gate), activation) * up
    y = F.linear(hidden, w_out, b_out)
    if residual is not None:
        y = y + residual
    return _norm(y, norm_weight, norm_bias, norm_eps, norm_kind) if norm_position == "post" else y


def embedding_formula(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-12,
) -> Tensor:
    y = F.embedding(input_ids, word_weight)
    if position_ids is not None and position_weight is not None:
        y = y + F.embedding(position_ids, position_weight)
    if token_type_ids is not None and token_type_weight is not None:
        y = y + F.embedding(token_type_ids, token_type_weight)
    return y if norm_weight is None else F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, norm_eps)


def linear_cross_entropy_formula(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """With all logits; in half types they are rounded to half first, and the loss is in float32."""
    logits = F.linear(x, weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target, **options)


def _attention_both(*args: Any, **kwargs: Any) -> Any:
    return bk.attention(*args, **kwargs, return_logsumexp=True)


def _probabilities(*args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return bk.attention_probabilities(*args, **kwargs)


def _statistics(*args: Any, **kwargs: Any) -> Any:
    """Without the names of the largest, of which equal ones come in any order."""
    with torch.no_grad():
        found = bk.attention_statistics(*args, **kwargs)
    return found.entropy, found.mass, found.top_probabilities


#: operator -> (public function, formula)
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention_both, attention_formula),
    "attention_statistics": (_statistics, attention_statistics_formula),
    "attention_probabilities": (_probabilities, attention_probabilities_formula),
    "linear": (bk.linear, linear_formula),
    "feed_forward": (bk.feed_forward, feed_forward_formula),
    "layer_norm": (bk.layer_norm, layer_norm_formula),
    "rms_norm": (bk.rms_norm, rms_norm_formula),
    "embedding": (bk.embedding, embedding_formula),
    "linear_cross_entropy": (bk.linear_cross_entropy, linear_cross_entropy_formula),
}


# The cases.


class Maker:
    """Makes seeded random tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self.device, dtype or self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, high, shape, generator=self._generator, dtype=dtype).to(self.device)

    def lengths(self, *lengths: int) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)

    def prefix_mask(self, size: int, *lengths: int, left: bool = False) -> Tensor:
        places = torch.arange(size)
        visible = torch.stack([places >= size - n if left else places < n for n in lengths])
        return visible.to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an operator: `build` makes the arguments of its public function."""

    op: str
    label: str
    dtype: torch.dtype
    build: Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.op} {self.label} {str(self.dtype).removeprefix('torch.')}"


def _attention(
    m: Maker,
    batch: int,
    heads: int,
    kv_heads: int,
    rows: int,
    keys: int,
    dim: int,
    *,
    layout: str = "contiguous",
    scale: float = 1.0,
    bias: tuple[int, ...] | None = None,
    bias_dtype: torch.dtype | None = None,
    visible: tuple[int, ...] | None = None,
    left_padding: bool = False,
    alibi: tuple[int, ...] | None = None,
    sinks: torch.dtype | None = None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def tensor(h: int, s: int) -> Tensor:
        if layout == "bshd":
            return m.normal(batch, s, h, dim, scale=scale).transpose(1, 2)
        if layout == "reversed":  # a last dimension that is not contiguous
            return m.normal(batch, h, dim, s, scale=scale).transpose(2, 3)
        if layout == "padded":  # rows that are longer in memory than head_dim
            return m.normal(batch, h, s, dim + 3, scale=scale)[..., :dim]
        return m.normal(batch, h, s, dim, scale=scale)

    if layout == "qkv":
        query, key, value = m.normal(batch, rows, 3, heads, dim, scale=scale).permute(2, 0, 3, 1, 4)
    else:
        query, key, value = tensor(heads, rows), tensor(kv_heads, keys), tensor(kv_heads, keys)
    if bias is not None:
        options["bias"] = m.normal(*bias, dtype=bias_dtype)
    if visible is not None:
        options["key_padding_mask"] = m.prefix_mask(keys, *visible, left=left_padding)
    options |= _head_terms(m, heads, alibi, sinks, options.get("dropout_p", 0.0))
    return (query, key, value), options


def _head_terms(
    m: Maker, heads: int, alibi: tuple[int, ...] | None, sinks: torch.dtype | None, dropout_p: float
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if alibi is not None:
        options["alibi_slopes"] = m.normal(*alibi, scale=0.1, dtype=torch.float32).abs()
    if sinks is not None:
        options["sinks"] = m.normal(heads, dtype=sinks)
    if dropout_p:
        options["dropout_seed"] = m.integers(2**62)
    return options


def _packed(
    m: Maker,
    heads: int,
    kv_heads: int,
    dim: int,
    q: tuple[int, ...],
    k: tuple[int, ...],
    fused: bool = False,
    alibi: tuple[int, ...] | None = None,
    sinks: torch.dtype | None = None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    options |= _head_terms(m, heads, alibi, sinks, options.get("dropout_p", 0.0))
    if fused:
        query, key, value = m.normal(sum(q), 3, heads, dim).unbind(1)
    else:
        query, key, value = (m.normal(sum(n), h, dim) for n, h in ((q, heads), (k, kv_heads), (k, kv_heads)))
    return (query, key, value), {"cu_seqlens_q": m.lengths(*q), "cu_seqlens_k": m.lengths(*k), **options}


def _attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    def dense(label: str, *sizes: int, **options: Any) -> Case:
        return Case("attention", label, dtype, lambda m: _attention(m, *sizes, **options))

    def packed(label: str, *sizes: Any, **options: Any) -> Case:
        return Case("attention", label, dtype, lambda m: _packed(m, *sizes, **options))

    for size in (1, 17, 127, 129, 1000):
        yield dense(f"S={size}", 1, 2, 2, size, size, 32)
        yield dense(f"causal S={size}", 1, 2, 2, size, size, 32, is_causal=True)
    for dim in (1, 16, 20, 33, 64, 80, 96, 128, 160, 256):
        yield dense(f"head_dim={dim}", 2, 2, 2, 37, 50, dim)
    yield dense("one query, many keys", 2, 4, 4, 1, 517, 64, is_causal=True)
    yield dense("more keys than queries, causal", 1, 2, 2, 33, 100, 64, is_causal=True)
    yield dense("more queries than keys, causal: blind rows", 1, 2, 2, 100, 33, 64, is_causal=True)
    yield dense("no keys", 1, 2, 2, 5, 0, 16)
    yield dense("no queries", 1, 2, 2, 0, 5, 16)
    yield dense("no batch", 0, 2, 2, 5, 5, 16)
    yield dense("GQA 8/2", 2, 8, 2, 65, 65, 64, is_causal=True)
    yield dense("MQA 6/1", 2, 6, 1, 40, 70, 32)
    for window in ((8, 0), (0, 0), (None, 3), (5, None), (3, 4), (200, 200)):
        yield dense(f"window={window}", 1, 2, 2, 130, 130, 32, window=window)
    yield dense("window and causal, more keys", 1, 2, 1, 70, 200, 32, window=(16, 5), is_causal=True)
    yield dense("window, fewer keys", 1, 2, 2, 120, 40, 32, window=(4, 4))
    yield dense("padding", 4, 2, 2, 60, 60, 32, visible=(60, 33, 1, 0))
    yield dense(
        "left padding and causal: blind rows",
        3,
        2,
        2,
        65,
        65,
        64,
        visible=(65, 10, 1),
        left_padding=True,
        is_causal=True,
    )
    yield dense("softcap", 1, 4, 2, 65, 65, 64, softcap=5.0, scale=2.0)
    for shape in (
        (2, 3, 40, 50),
        (1, 3, 40, 50),
        (2, 1, 1, 50),
        (1, 3, 40, 1),
        (40, 50),
        (50,),
        (2, 3, 1, 1),
    ):
        yield dense(f"bias {shape}", 2, 3, 3, 40, 50, 32, bias=shape)
    yield dense(
        "bias in float32, softcap, GQA, causal, padding",
        2,
        4,
        2,
        70,
        70,
        48,
        bias=(1, 4, 70, 70),
        bias_dtype=torch.float32,
        softcap=10.0,
        is_causal=True,
        visible=(70, 41),
    )
    yield dense("softmax_scale=1", 2, 2, 2, 30, 30, 64, softmax_scale=1.0, scale=0.3)
    yield dense("large logits", 1, 2, 2, 65, 65, 64, scale=8.0)
    for layout in ("bshd", "qkv", "reversed", "padded"):
        yield dense(f"layout {layout}", 2, 4, 4, 50, 50, 64, layout=layout)
    yield dense("ALiBi, causal", 2, 4, 4, 65, 65, 64, alibi=(4,), is_causal=True)
    yield dense("ALiBi of each sequence, other keys, bias", 2, 4, 2, 40, 70, 32, alibi=(2, 4), bias=(40, 70))
    yield dense("ALiBi, softcap, window", 1, 2, 2, 130, 130, 32, alibi=(2,), softcap=5.0, window=(20, 9))
    yield dense("sinks", 2, 4, 2, 65, 65, 64, sinks=dtype, is_causal=True)
    yield dense("sinks in float32, blind rows", 3, 4, 4, 40, 50, 32, sinks=torch.float32, visible=(50, 9, 0))
    yield dense("sinks, window, fewer keys", 1, 4, 1, 120, 40, 32, sinks=dtype, window=(4, 4))
    yield dense("sinks, no keys", 1, 2, 2, 5, 0, 16, sinks=dtype)
    for dim, p in ((32, 0.1), (64, 0.5), (128, 0.9)):
        yield dense(f"dropout {p}, head_dim={dim}", 3, 4, 2, 77, 85, dim, dropout_p=p)
    yield dense(
        "dropout, causal, padding", 2, 2, 2, 130, 130, 64, dropout_p=0.2, is_causal=True, visible=(130, 77)
    )
    yield dense(
        "dropout, window, softcap, bias, ALiBi, sinks", 2, 4, 2, 70, 90, 32, dropout_p=0.3, window=(40, 20),
        softcap=5.0, bias=(1, 4, 1, 90), alibi=(4,), sinks=dtype,
    )  # fmt: skip
    lengths = (17, 0, 1, 130, 64)
    yield packed("packed", 2, 2, 32, lengths, lengths)
    yield packed("packed, causal, fused", 4, 4, 64, lengths, lengths, fused=True, is_causal=True)
    yield packed("packed, GQA, window, softcap", 6, 2, 40, lengths, lengths, window=(9, 3), softcap=4.0)
    yield packed("packed, other keys, causal", 2, 1, 32, (5, 0, 9, 3), (9, 4, 0, 2), is_causal=True)
    yield packed("packed, nothing in it", 2, 2, 16, (0, 0), (0, 0))
    yield packed("packed, dropout", 4, 4, 64, lengths, lengths, fused=True, dropout_p=0.1)
    yield packed("packed, dropout, other keys", 2, 1, 32, (5, 0, 9, 3), (9, 4, 0, 2), dropout_p=0.4)
    yield packed("packed, ALiBi, causal", 4, 2, 32, lengths, lengths, alibi=(5, 4), is_causal=True)
    yield packed("packed, sinks, window", 4, 2, 32, lengths, lengths, sinks=dtype, window=(9, 3))
    yield packed(
        "packed, ALiBi, sinks, other keys",
        2,
        1,
        32,
        (5, 0, 9, 3),
        (9, 4, 0, 2),
        alibi=(2,),
        sinks=torch.float32,
    )


def _attention_maps_cases(op: str, dtype: torch.dtype, more: dict[str, Any]) -> Iterator[Case]:
    def case(label: str, *sizes: int, **options: Any) -> Case:
        def build(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
            (query, key, _), rest = _attention(m, *sizes, **options)
            return (query, key), {**rest, **more}

        return Case(op, label, dtype, build)

    yield case("B=2 H=4 S=129 D=64", 2, 4, 4, 129, 129, 64)
    yield case("causal GQA", 2, 4, 2, 65, 97, 32, is_causal=True)
    yield case("one query", 1, 4, 4, 1, 1000, 64)
    yield case("large logits", 1, 2, 2, 33, 33, 64, scale=6.0)
    yield case("key padding, blind rows", 3, 2, 2, 17, 19, 32, visible=(19, 7, 0))
    windowed: dict[str, Any] = {"is_causal": True, "window": (9, None)}
    yield case("window, left padding", 2, 2, 1, 65, 65, 48, **windowed, visible=(65, 30), left_padding=True)
    yield case("bias, softcap", 2, 2, 2, 31, 33, 32, bias=(1, 2, 31, 33), softcap=4.0)
    yield case("ALiBi", 2, 4, 4, 33, 33, 32, alibi=(4,), is_causal=True)
    if op == "attention_probabilities":
        yield case("sinks", 2, 4, 2, 33, 33, 32, sinks=dtype)


def _statistics_cases(dtype: torch.dtype) -> Iterator[Case]:
    return _attention_maps_cases("attention_statistics", dtype, {"top_k": 1})


def _probabilities_cases(dtype: torch.dtype) -> Iterator[Case]:
    return _attention_maps_cases("attention_probabilities", dtype, {})


def _linear(
    m: Maker,
    lead: tuple[int, ...],
    size_in: int,
    sizes: tuple[int, ...],
    *,
    bias: bool = True,
    residual: bool = False,
    norm: bool = False,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    conv1d = options.get("weight_layout") == "conv1d"
    scale = size_in**-0.5
    weights = [m.normal(*((size_in, n) if conv1d else (n, size_in)), scale=scale) for n in sizes]
    biases = [m.normal(n) for n in sizes] if bias else None
    if residual:
        options["residual"] = m.normal(*lead, sum(sizes))
    if norm:
        options["norm_weight"] = m.normal(sum(sizes))
        if options.get("norm_kind") != "rms_norm":
            options["norm_bias"] = m.normal(sum(sizes))
    return (m.normal(*lead, size_in), weights, biases), options


def _linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(label: str, *sizes: Any, **options: Any) -> Case:
        return Case("linear", label, dtype, lambda m: _linear(m, *sizes, **options))

    for rows in (0, 1, 17, 127, 129, 1000):
        yield case(f"rows={rows}", (rows,), 64, (96,))
    for size_in, size_out in ((1, 1), (17, 33), (127, 129), (384, 100), (1000, 17)):
        yield case(f"{size_in}->{size_out}", (3, 5), size_in, (size_out,))
    for activation in ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"):
        yield case(f"activation {activation}", (2, 9), 48, (65,), activation=activation)
        yield case(
            f"activation {activation}, all else",
            (2, 9),
            48,
            (65,),
            activation=activation,
            residual=True,
            norm=True,
            weight_layout="conv1d",
        )
    yield case("three weights", (2, 19), 48, (48, 16, 16))
    yield case("three weights, conv1d, no bias", (40,), 33, (33, 7, 7), bias=False, weight_layout="conv1d")
    yield case("residual", (33,), 64, (64,), residual=True)
    yield case("norm", (33,), 64, (130,), norm=True)
    yield case("no leading dimension", (), 20, (30,), residual=True, norm=True)
    yield case("RMSNorm", (33,), 64, (130,), norm=True, norm_kind="rms_norm", residual=True, bias=False)


def _feed_forward(
    m: Maker,
    lead: tuple[int, ...],
    size_in: int,
    hidden: int,
    size_out: int,
    *,
    bias: bool = True,
    residual: bool = True,
    gated: bool = False,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    w_in = m.normal(hidden, size_in, scale=size_in**-0.5)
    w_out = m.normal(size_out, hidden, scale=hidden**-0.5)
    if options.get("weight_layout") == "conv1d":
        w_in, w_out = w_in.t().contiguous(), w_out.t().contiguous()
    if residual:
        options["residual"] = m.normal(*lead, size_out)
    if options.get("norm_position", "none") != "none":
        size = size_in if options["norm_position"] == "pre" else size_out
        options["norm_weight"] = m.normal(size)
        if options.get("norm_kind") != "rms_norm":
            options["norm_bias"] = m.normal(size)
    if gated:
        options["w_gate"] = m.normal(*w_in.shape, scale=size_in**-0.5)
        if bias:
            options["b_gate"] = m.normal(hidden)
    b_in, b_out = (m.normal(hidden), m.normal(size_out)) if bias else (None, None)
    return (m.normal(*lead, size_in), w_in, b_in, w_out, b_out), options


def _feed_forward_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(label: str, *sizes: Any, **options: Any) -> Case:
        options = {"activation": "gelu", **options}
        return Case("feed_forward", label, dtype, lambda m: _feed_forward(m, *sizes, **options))

    for rows in (0, 1, 17, 127, 129, 1000):
        yield case(f"rows={rows}", (rows,), 64, 256, 64, norm_position="post")
    for activation in ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"):
        for position in ("none", "pre", "post"):
            yield case(
                f"{activation}, norm {position}",
                (2, 9),
                40,
                65,
                40,
                activation=activation,
                norm_position=position,
            )
    for position in ("none", "pre", "post"):
        yield case(
            f"conv1d, norm {position}", (2, 17), 48, 130, 48, norm_position=position, weight_layout="conv1d"
        )
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"):
        yield case(f"gated {activation}", (2, 9), 40, 65, 40, activation=activation, gated=True)
    for position in ("none", "pre", "post"):
        rms = {"gated": True, "norm_kind": "rms_norm", "activation": "silu", "bias": False}
        if position == "none":
            del rms["norm_kind"]
        yield case(
            f"SwiGLU without biases, norm {position}", (3, 11), 48, 130, 48, norm_position=position, **rms
        )
    yield case("GeGLU, conv1d", (33,), 40, 65, 40, gated=True, weight_layout="conv1d")
    yield case("no bias, no residual", (33,), 17, 129, 20, bias=False, residual=False)
    yield case("384 -> 1536 -> 384", (2, 33), 384, 1536, 384, norm_position="post")


def _layer_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(
        label: str,
        *shape: int,
        weight: bool = True,
        bias: bool = True,
        residual: bool = False,
        **scales: float,
    ) -> Case:
        def build(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = m.normal(*shape, scale=scales.get("scale", 1.0)) + scales.get("shift", 0.0)
            parameters = [m.normal(shape[-1]) if given else None for given in (weight, bias)]
            return (x, *parameters, 1e-5), {"residual": m.normal(*shape) if residual else None}

        return Case("layer_norm", label, dtype, build)

    for size in (3, 17, 127, 129, 384, 1000, 5000):
        yield case(f"N={size}", 13, size)
        yield case(f"residual N={size}", 13, size, residual=True)
    for rows in (0, 1, 17, 1000):
        yield case(f"rows={rows}", rows, 96, residual=True)
    yield case("no bias", 2, 5, 64, bias=False)
    yield case("no weight", 2, 5, 64, weight=False, bias=False)
    yield case("mean far from 0", 9, 768, shift=30.0)
    yield case("small numbers", 9, 768, scale=1e-3)


def _rms_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(
        label: str,
        *shape: int,
        weight: bool = True,
        residual: bool = False,
        scale: float = 1.0,
        **options: float,
    ) -> Case:
        def build(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = m.normal(*shape, scale=scale)
            parameter = m.normal(shape[-1]) if weight else None
            return (x, parameter, 1e-6, m.normal(*shape) if residual else None), options

        return Case("rms_norm", label, dtype, build)

    for size in (1, 17, 127, 129, 1000, 5000):
        yield case(f"N={size}", 13, size)
    yield case("residual", 2, 5, 384, residual=True)
    yield case("no weight", 33, 64, weight=False)
    yield case("weight_offset", 33, 96, weight_offset=1.0)
    yield case("no rows", 0, 64)
    yield case("small numbers", 9, 768, scale=1e-3)


def _embedding_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(
        label: str,
        shape: tuple[int, ...],
        hidden: int,
        *,
        position: tuple[int, ...] | None = None,
        types: tuple[int, ...] | None = None,
        norm: bool = True,
        ids: torch.dtype = torch.int64,
    ) -> Case:
        def build(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments: list[Any] = [m.integers(50, *shape, dtype=ids), m.normal(50, hidden)]
            for rows, size in ((40, position), (2, types)):
                if size is None:
                    arguments += [None, None]
                else:
                    arguments += [m.integers(rows, *size, dtype=ids), m.normal(rows, hidden)]
            norms = [m.normal(hidden), m.normal(hidden)] if norm else [None, None]
            return (*arguments, *norms, 1e-12), {}

        return Case("embedding", label, dtype, build)

    for hidden in (5, 17, 127, 129, 384, 1000):
        yield case(f"hidden={hidden}", (2, 9), hidden, position=(1, 9), types=(2, 9))
    yield case("word alone", (3, 7), 64, norm=False)
    yield case("no norm", (3, 7), 64, position=(7,), types=(1, 1), norm=False)
    yield case("int32, packed", (33,), 64, position=(33,), types=(33,), ids=torch.int32)
    yield case("no ids", (0,), 64, position=(1,))
    yield case("many", (8, 127), 48, position=(1, 127), types=(8, 127))


def _linear_cross_entropy_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(
        label: str,
        rows: int,
        features: int,
        classes: int,
        *,
        bias: bool = False,
        ignored: int = 0,
        scale: float = 1.0,
        **options: Any,
    ) -> Case:
        def build(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
            target = m.integers(classes, rows)
            target[:ignored] = -100
            x, weight = (
                m.normal(rows, features, scale=scale),
                m.normal(classes, features, scale=features**-0.5),
            )
            # One number has no mean error to speak of: the losses of the rows, unless told otherwise.
            asked = {"reduction": "none", **options}
            return (x, weight, target, m.normal(classes) if bias else None), asked

        return Case("linear_cross_entropy", label, dtype, build)

    for rows in (7, 17, 127, 129):
        yield case(f"rows={rows}", rows, 64, 1000)
    for classes in (1, 2, 33, 5000):
        yield case(f"classes={classes}", 40, 48, classes, bias=True)
    for reduction in ("mean", "sum", "none"):
        yield case(f"{reduction}, smoothed", 33, 40, 300, reduction=reduction, label_smoothing=0.1)
        yield case(f"{reduction}, ignored rows", 65, 40, 300, ignored=21, reduction=reduction)
    yield case("large logits", 40, 64, 500, scale=30.0)
    yield case("no rows", 0, 16, 30, reduction="sum")
    yield case("odd sizes", 31, 37, 1009, bias=True, ignored=5)


_CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "attention": _attention_cases,
    "linear": _linear_cases,
    "feed_forward": _feed_forward_cases,
    "layer_norm": _layer_norm_cases,
    "rms_norm": _rms_norm_cases,
    "embedding": _embedding_cases,
    "linear_cross_entropy": _linear_cross_entropy_cases,
    "attention_statistics": _statistics_cases,
    "attention_probabilities": _probabilities_cases,
}


def cases(op: str | None = None, dtypes: Iterable[torch.dtype] = DTYPES) -> Iterator[Case]:
    """All cases, or those of one operator."""
    if op is not None and op not in _CASES:
        raise ValueError(f"op={op!r} is unknown; allowed are {', '.join(_CASES)}")
    for dtype in dtypes:
        for name, make in _CASES.items():
            if op in (None, name):
                yield from make(dtype)


# Running them.


@dataclass(frozen=True)
class Result:
    """What became of a case: a verdict for each output and each gradient, or why it did not run."""

    case: Case
    backend: str | None
    verdicts: dict[str, Verdict]
    seconds: float
    skipped: str | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and all(v.ok for v in self.verdicts.values())

    def __str__(self) -> str:
        if self.skipped or self.error:
            return f"{self.case}: {self.skipped or self.error}"
        wrong = [f"{name}: {v}" for name, v in self.verdicts.items() if not v.ok]
        return f"{self.case} on {self.backend}: " + ("ok" if not wrong else "; ".join(wrong))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is NaN inside the block, so that an element that is never written is seen."""
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


#: What the name of a gradient begins with among the verdicts of a result.
GRADIENT = "grad "

#: Arguments without a gradient.
_CONSTANTS = ("alibi_slopes",)


def _leaves(arguments: Any, dtype: torch.dtype | None) -> Any:
    """The same arguments with fresh leaves that want gradients in place of the floating tensors."""
    if isinstance(arguments, Tensor):
        if not arguments.is_floating_point():
            return arguments
        leaf = arguments.detach()  # keeps the strides, which are part of the case
        return (leaf if dtype is None else leaf.to(dtype)).requires_grad_()
    if isinstance(arguments, dict):
        return {k: v if k in _CONSTANTS else _leaves(v, dtype) for k, v in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_leaves(v, dtype) for v in arguments)
    return arguments


def _named(arguments: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(arguments, Tensor):
        if arguments.is_floating_point():
            yield prefix, arguments
    elif isinstance(arguments, (dict, list, tuple)):
        items = arguments.items() if isinstance(arguments, dict) else enumerate(arguments)
        for key, value in items:
            if key in _CONSTANTS:
                continue
            yield from _named(value, f"{prefix}.{key}" if prefix else str(key))


def evaluate(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    dtype: torch.dtype | None,
    upstream: Sequence[Tensor],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of a call, and by name the gradients of all floating tensors in it.

    dtype: in which it runs; None for each tensor in its own. upstream: the gradients of the outputs.
    """
    args, kwargs = _leaves(args, dtype), _leaves(kwargs, dtype)
    outputs = function(*args, **kwargs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    leaves = dict([*_named(args, "args"), *_named(kwargs)])
    # Blind rows have a logsumexp of -inf, which has no gradient.
    terms = [
        torch.where(o.isfinite(), o, 0.0) * u.to(o.dtype) for o, u in zip(outputs, upstream, strict=True)
    ]
    total = torch.stack([t.sum(dtype=torch.float64) for t in terms]).sum()
    if not total.requires_grad:  # an operator without a gradient
        return outputs, {}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zeros = (
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves.values(), strict=True)
    )
    return [o.detach() for o in outputs], dict(zip(leaves, zeros, strict=True))


def run_case(case: Case, backend: str | None = None, device: str = "cpu", seed: int = 0) -> Result:
    """Runs a case forward and backward on the backend (the one that the table picks, when None)."""
    start = time.perf_counter()
    public, formula = FUNCTIONS[case.op]
    maker = Maker(case.dtype, device, seed=zlib.crc32(case.label.encode()) + seed)
    args, kwargs = case.build(maker)
    chosen: str | None = None
    verdicts: dict[str, Verdict] = {}
    with backends.use(backend):
        explanation = bk.explain(case.op, *args, **kwargs)
        chosen = explanation.chosen
        if chosen is None:
            return Result(case, None, {}, time.perf_counter() - start, skipped=explanation.error)
        shapes = [o.shape for o in _outputs(formula(*args, **kwargs))]
        upstream = [maker.normal(*shape) for shape in shapes]
        try:
            with poisoned():
                outs, grads = evaluate(public, args, kwargs, None, upstream)
        except (
            Exception
        ) as problem:  # a broken kernel is a finding of this tool, which goes on to the next case
            error = f"{type(problem).__name__}: {problem}"
            return Result(case, chosen, {}, time.perf_counter() - start, error=error)
    eager_outs, eager_grads = evaluate(formula, args, kwargs, None, upstream)
    ref_outs, ref_grads = evaluate(formula, args, kwargs, torch.float64, upstream)
    names = _RESULTS.get(case.op, ("out",))
    for name, out, eager, ref in zip(names, outs, eager_outs, ref_outs, strict=True):
        verdicts[name] = compare(out, eager, ref)
    for name, grad in grads.items():
        verdicts[GRADIENT + name] = compare(grad, eager_grads[name], ref_grads[name], "gradient")
    return Result(case, chosen, verdicts, time.perf_counter() - start)


#: What operators with several results call them.
_RESULTS = {
    "attention": ("out", "logsumexp"),
    "attention_statistics": ("entropy", "mass", "top probabilities"),
}


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def run(
    what: Iterable[Case],
    backend: str | None = None,
    device: str = "cpu",
    progress: Callable[[Result], None] | None = None,
    seed: int = 0,
) -> list[Result]:
    """Runs the cases one after the other; `progress` is called with each result as it comes. Another seed is
    other numbers in the same cases.
    """
    results = []
    for case in what:
        result = run_case(case, backend, device, seed)
        results.append(result)
        if progress is not None:
            progress(result)
    return results
