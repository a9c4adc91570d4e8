"""Attention and its gradient in plain PyTorch: the definition of right.

Works over blocks of query rows, so that no tensor of Sq x Sk elements is made, in float32 for half inputs
(one rounding, at the end) and in float64 for float64 inputs. Masks are computed for each block from indices.
The gradient follows FlashAttention-2 (Dao, 2023, arXiv:2307.08691), but computes the probabilities again from
the logits alone: a block has whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bigmodel_kernels.ops.philox import keep_attention
from bigmodel_kernels.ops.registration import compute_dtype
from bigmodel_kernels.ops.side_by_side import empty_heads, empty_key_gradient

# A block holds at most this many logits (unless 16 rows hold more) and at most 256 rows. On the CPU it takes
# only as much of the batch as keeps the logits near the cores: half the time of a whole BERT batch at once.
_BLOCK_ELEMENTS = 1 << 22
_BATCH_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class _Rule:
    """What the logits of one call go through, apart from the tensors."""

    scale: float
    softcap: float
    left: int  # -1: no limit
    right: int
    dropout_p: float


def _rule(
    softmax_scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> _Rule:
    return _Rule(softmax_scale, softcap, window_left, 0 if is_causal else window_right, dropout_p)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    softmax_scale: float,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.attention`."""
    rule = _rule(softmax_scale, is_causal, window_left, window_right, softcap, dropout_p)
    out = empty_heads(query, query.shape[1])
    rows = query.shape[:3] if cu_seqlens_q is None else (query.shape[1], query.shape[0])
    logsumexp = query.new_empty(rows, dtype=compute_dtype(query.dtype))
    for part in _parts(query, key, cu_seqlens_q, cu_seqlens_k):
        _forward(
            part.queries(query),
            part.keys(key),
            part.keys(value),
            part.mask(key_padding_mask),
            part.bias(bias),
            dropout_seed,
            part.slopes(alibi_slopes),
            sinks,
            part.first,
            rule,
            part.queries(out),
            part.rows(logsumexp),
        )
    return out, logsumexp


def run_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    softmax_scale: float,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    bias_requires_grad: bool = False,
    sinks_require_grad: bool = False,
    deterministic: bool = False,
    side_by_side: bool = False,
    keep: Callable[..., Tensor] = keep_attention,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias and sinks (empty tensors for the last two when not wanted), given
    those of both outputs. The same from run to run, asked or not. `side_by_side` is a permission, of which
    this makes no use. `keep`: who makes the blocks of dropout."""
    rule = _rule(softmax_scale, is_causal, window_left, window_right, softcap, dropout_p)
    compute = compute_dtype(query.dtype)
    dq = empty_heads(query, query.shape[1])
    dk, dv = (empty_key_gradient(t, compute).zero_() for t in (key, value))
    dbias = None
    if bias is not None and bias_requires_grad:
        dbias = bias.new_zeros(bias.shape, dtype=compute)
    dsinks = None
    if sinks is not None and sinks_require_grad:
        dsinks = sinks.new_zeros(sinks.shape, dtype=compute)
    for part in _parts(query, key, cu_seqlens_q, cu_seqlens_k):
        _backward(
            part.queries(grad_out),
            None if grad_logsumexp is None else part.rows(grad_logsumexp),
            part.queries(query),
            part.keys(key),
            part.keys(value),
            part.mask(key_padding_mask),
            part.bias(bias),
            dropout_seed,
            part.slopes(alibi_slopes),
            sinks,
            part.first,
            rule,
            part.queries(dq),
            part.keys(dk),
            part.keys(dv),
            part.bias(dbias),
            dsinks,
            keep,
        )
    return (
        dq,
        dk.to(key.dtype),
        dv.to(value.dtype),
        query.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype),
        query.new_empty(0) if sinks is None or dsinks is None else dsinks.to(sinks.dtype),
    )


def run_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    softmax_scale: float,
    is_causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.attention_decode`: one sequence after the other, as `run` does them."""
    out = empty_heads(query, query.shape[1])
    logsumexp = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    for b, length in enumerate(cache_seqlens.tolist()):
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out[b : b + 1], logsumexp[b : b + 1] = run(
            query[b : b + 1],
            cached(key_cache, block_table, b, length),
            cached(value_cache, block_table, b, length),
            alibi_slopes=slopes,
            sinks=sinks,
            softmax_scale=softmax_scale,
            is_causal=is_causal,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
        )
    return out, logsumexp


def cached(cache: Tensor, block_table: Tensor | None, sequence: int, length: int) -> Tensor:
    """(1, Hkv, length, D): what a cache holds of one sequence; a view, or gathered from its pages."""
    if block_table is None:
        return cache[sequence : sequence + 1, :, :length]
    _, heads, size, dim = cache.shape
    pages = cache[block_table[sequence, : -(-length // max(1, size))].long()]  # (pages, Hkv, size, D)
    return pages.transpose(0, 1).reshape(1, heads, -1, dim)[:, :, :length]


@dataclass(frozen=True)
class _Part:
    """Some of a batch, or one packed sequence: views of its tensors in the dense form."""

    first: int  # the number of its first sequence
    batch: slice
    q: slice | None = None
    k: slice | None = None

    def queries(self, tensor: Tensor) -> Tensor:
        return tensor[self.batch] if self.q is None else tensor[self.q].transpose(0, 1)[None]

    def keys(self, tensor: Tensor) -> Tensor:
        return tensor[self.batch] if self.k is None else tensor[self.k].transpose(0, 1)[None]

    def rows(self, logsumexp: Tensor) -> Tensor:
        return logsumexp[self.batch] if self.q is None else logsumexp[None, :, self.q]

    def mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask[self.batch]

    def bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        bias = bias[(None,) * (4 - bias.dim())]
        return bias if bias.shape[0] == 1 else bias[self.batch]

    def slopes(self, slopes: Tensor | None) -> Tensor | None:
        """(B or 1, H, 1, 1)."""
        if slopes is None:
            return None
        if slopes.dim() == 2:
            slopes = slopes[self.first : self.first + self.batch.stop - self.batch.start]
        return slopes.view(-1, slopes.shape[-1], 1, 1)


def _parts(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[_Part]:
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for i in range(len(q) - 1):
            yield _Part(i, slice(0, 1), slice(q[i], q[i + 1]), slice(k[i], k[i + 1]))
        return
    batch, heads, rows, _ = query.shape
    step = max(1, _BATCH_ELEMENTS // max(1, heads * rows * key.shape[2])) if query.is_cpu else max(1, batch)
    for start in range(0, batch, step):
        yield _Part(start, slice(start, min(batch, start + step)))


def _blocks(query: Tensor, key: Tensor, rule: _Rule) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, each with the range of keys that the window leaves to it."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    offset = keys - rows
    step = min(256, max(16, _BLOCK_ELEMENTS // max(1, batch * heads * keys)))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        first = 0 if rule.left < 0 else min(keys, max(0, start + offset - rule.left))
        last = keys if rule.right < 0 else min(keys, max(0, stop + offset + rule.right))
        yield slice(start, stop), slice(first, max(first, last))


def _grouped(block: Tensor, kv_heads: int) -> Tensor:
    """(B, H, R, D) -> (B, Hkv, G * R, D): the query heads of a key head side by side, so no key is copied."""
    batch, heads, rows, dim = block.shape
    return block.reshape(batch, kv_heads, heads // kv_heads * rows, dim)


def _logits(
    q: Tensor,
    k: Tensor,
    heads: int,
    rows: slice,
    keys: slice,
    offset: int,
    mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    rule: _Rule,
) -> tuple[Tensor, Tensor | None]:
    """Masked logits (B, H, R, K) of a block, and tanh of the capped ones when there is a cap."""
    batch, _, _, _ = k.shape
    logits = (q @ k.transpose(-1, -2)).view(batch, heads, rows.stop - rows.start, keys.stop - keys.start)
    logits *= rule.scale
    tanh = None
    if rule.softcap > 0:
        tanh = torch.tanh(logits / rule.softcap)
        logits = rule.softcap * tanh
    if bias is not None:
        logits = logits + bias[..., _clip(rows, bias.shape[-2]), _clip(keys, bias.shape[-1])].to(logits.dtype)
    i = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + offset
    j = torch.arange(keys.start, keys.stop, device=q.device)
    if slopes is not None:
        logits = logits - slopes.to(logits.dtype) * (i - j).abs()
    if rule.left >= 0 or rule.right >= 0:
        if rule.right >= 0:
            logits.masked_fill_(j > i + rule.right, -torch.inf)
        if rule.left >= 0:
            logits.masked_fill_(j < i - rule.left, -torch.inf)
    if mask is not None:
        logits.masked_fill_(~mask[:, None, None, keys], -torch.inf)
    return logits, tanh


def _clip(part: slice, size: int) -> slice:
    """The part of a dimension, or the whole of a broadcast one."""
    return slice(None) if size == 1 else part


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    sequence: int,
    rule: _Rule,
    out: Tensor,
    logsumexp: Tensor,
) -> None:
    """Dense attention into `out` and `logsumexp`."""
    heads, kv_heads, offset = query.shape[1], key.shape[1], key.shape[2] - query.shape[2]
    compute = compute_dtype(query.dtype)
    key, value = key.to(compute), value.to(compute)
    sink = None if sinks is None else sinks.to(compute)[None, :, None, None]
    for rows, keys in _blocks(query, key, rule):
        q = _grouped(query[:, :, rows].to(compute), kv_heads)
        if keys.start == keys.stop:
            out[:, :, rows] = 0
            logsumexp[:, :, rows] = -torch.inf if sink is None else sink[..., 0]
            continue
        logits, _ = _logits(q, key[:, :, keys], heads, rows, keys, offset, mask, bias, slopes, rule)
        top, weights, _, total = _weights(logits, sink)
        logsumexp[:, :, rows] = (top + total.log()).squeeze(-1)
        if seed is not None:
            weights *= keep_attention(seed, rule.dropout_p, sequence, query.shape[1], rows, keys, weights)
        result = (_grouped(weights, kv_heads) @ value[:, :, keys]).view(*weights.shape[:3], value.shape[-1])
        out[:, :, rows] = (result / torch.where(total == 0, 1.0, total)).to(out.dtype)


def _weights(logits: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Maximum of whole rows, exp(logits - maximum) in their memory, the sink's, and the sum of both."""
    top = logits.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    # A row with no visible key: exp(-inf - 0) = 0, not NaN.
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp_(logits.sub_(top))
    total = weights.sum(-1, keepdim=True)
    of_sink = None if sink is None else torch.exp(sink - top)  # of the denominator, without a value
    if of_sink is not None:
        total += of_sink
    return top, weights, of_sink, total


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    sequence: int,
    rule: _Rule,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dsinks: Tensor | None,
    keep: Callable[..., Tensor],
) -> None:
    """Dense gradients: dq is written, the others (in the type of computation) are added to."""
    heads, kv_heads, offset = query.shape[1], key.shape[1], key.shape[2] - query.shape[2]
    compute = compute_dtype(query.dtype)
    key, value = key.to(compute), value.to(compute)
    sink = None if sinks is None else sinks.to(compute)[None, :, None, None]
    for rows, keys in _blocks(query, key, rule):
        if keys.start == keys.stop:
            dq[:, :, rows] = 0
            if dsinks is not None and grad_lse is not None:  # the sink is all of the sum
                dsinks += grad_lse[:, :, rows].sum((0, 2), dtype=compute)
            continue
        q = _grouped(query[:, :, rows].to(compute), kv_heads)
        grad = grad_out[:, :, rows].to(compute)
        k, v = key[:, :, keys], value[:, :, keys]
        logits, tanh = _logits(q, k, heads, rows, keys, offset, mask, bias, slopes, rule)
        # Of whole rows: less is rounded at a distance from their maximum than at that from the logsumexp.
        _, p, p_sink, total = _weights(logits, sink)
        total = torch.where(total == 0, 1.0, total)
        p /= total
        dp = (_grouped(grad, kv_heads) @ v.transpose(-1, -2)).view_as(p)
        dropped = p
        if seed is not None:
            kept = keep(seed, rule.dropout_p, sequence, heads, rows, keys, p)
            dropped = p * kept
            dp *= kept
        dv[:, :, keys] += _grouped(dropped, kv_heads).transpose(-1, -2) @ _grouped(grad, kv_heads)
        delta = (p * dp).sum(-1, keepdim=True)  # = rowsum(grad * out), without the rounding of out
        if dsinks is not None and p_sink is not None:
            of_sink = -delta if grad_lse is None else grad_lse[:, :, rows, None] - delta
            dsinks += (p_sink / total * of_sink).sum((0, 2, 3))
        ds = dp.sub_(delta)
        if grad_lse is not None:  # after the subtraction, which is exact where one key takes all
            ds += grad_lse[:, :, rows, None]
        ds *= p
        if dbias is not None:
            target = dbias[..., _clip(rows, dbias.shape[-2]), _clip(keys, dbias.shape[-1])]
            target += ds.sum_to_size(target.shape)
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
        ds = _grouped(ds * rule.scale, kv_heads)
        dq[:, :, rows] = (ds @ k).view(*p.shape[:3], k.shape[-1]).to(dq.dtype)
        dk[:, :, keys] += ds.transpose(-1, -2) @ q
