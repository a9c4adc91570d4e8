"""Statistics and probabilities of attention in plain PyTorch, tile by tile: the definition of right.

The logits are those of attention's own reference. A block is some rows of queries; where whole rows are too
long for a tile, their keys come in several, and are gone through twice: once for the maximum and the sum, and
once for the probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention.reference import _grouped, _logits, _Part, _parts, _Rule, _rule
from bigmodel_kernels.ops.registration import compute_dtype

# A tile holds about this many logits, and 8 rows of it at least: on the CPU it stays near the cores.
_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}
_FEWEST_ROWS = 8
_FEWEST_KEYS = 256
# Of t, which exp takes to 0 in float64 too.
_LOWEST = -1e4


def run_statistics(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
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
    top_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `bigmodel_kernels.attention_statistics`."""
    rule = _rule(softmax_scale, is_causal, window_left, window_right, softcap, 0.0)
    packed = cu_seqlens_q is not None
    rows = (query.shape[1], query.shape[0]) if packed else query.shape[:3]
    keys = (query.shape[1], key.shape[0]) if packed else (*query.shape[:2], key.shape[2])
    dtype = compute_dtype(query.dtype)
    entropy, mass = query.new_zeros(rows, dtype=dtype), query.new_zeros(keys, dtype=dtype)
    top_keys = query.new_full((*rows, top_k), -1, dtype=torch.int64)
    top_probabilities = query.new_zeros((*rows, top_k), dtype=dtype)
    for part in _parts(query, key, cu_seqlens_q, cu_seqlens_k):
        call = _Call.of(
            part, query, key, key_padding_mask, query_padding_mask, bias, alibi_slopes, sinks, rule
        )
        of_rows = [part.rows(t) for t in (entropy, top_keys, top_probabilities)]
        of_keys = mass[part.batch] if part.k is None else mass[None, :, part.k]
        for block in call.blocks(slice(0, call.query.shape[2])):
            _add_statistics(call, block, top_k, of_rows[0], of_keys, of_rows[1], of_rows[2])
    return entropy, mass, top_keys, top_probabilities


def run_probabilities(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
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
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
) -> Tensor:
    """See `bigmodel_kernels.attention_probabilities`."""
    rule = _rule(softmax_scale, is_causal, window_left, window_right, softcap, 0.0)
    packed = cu_seqlens_q is not None
    if heads is not None:
        query, key, bias, alibi_slopes, sinks = of_heads(heads, query, key, bias, alibi_slopes, sinks)
    total = query.shape[0] if packed else query.shape[2]
    chosen = list(range(total)) if queries is None else [q % total for q in queries]
    size = (query.shape[1], len(chosen), max_seqlen_k if packed else key.shape[2])
    out = query.new_zeros(size if packed else (query.shape[0], *size))
    for part in _parts(query, key, cu_seqlens_q, cu_seqlens_k):
        call = _Call.of(
            part, query, key, key_padding_mask, query_padding_mask, bias, alibi_slopes, sinks, rule
        )
        first = 0 if part.q is None else part.q.start
        result = out[part.batch] if part.q is None else out[None, ..., : call.key.shape[2]]
        for place, rows in _runs(chosen, first, first + call.query.shape[2]):
            for block in call.blocks(rows):
                start = place + block.rows.start - rows.start
                stop = start + block.rows.stop - block.rows.start
                softmax = call.softmax(block)
                for keys, _, weights in softmax.tiles:
                    result[:, :, start:stop, keys] = weights.div_(softmax.total)
    return out


def of_heads(
    heads: Sequence[int],
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors of these heads alone, each with a key head of its own."""
    every = query.shape[1]
    index = torch.tensor([head % every for head in heads], dtype=torch.int64, device=query.device)
    if bias is not None and bias.dim() > 2 and bias.shape[-3] != 1:
        bias = bias.index_select(-3, index)
    return (
        query.index_select(1, index),
        key.index_select(1, index // (every // key.shape[1])),
        bias,
        None if slopes is None else slopes.index_select(-1, index),
        None if sinks is None else sinks.index_select(0, index),
    )


def _runs(chosen: list[int], first: int, last: int) -> Iterator[tuple[int, slice]]:
    """Runs of consecutive queries from `first` to `last` among the chosen ones: where each run begins in the
    result, and its queries, counted from `first`."""
    start = 0
    while start < len(chosen):
        stop = start + 1
        while stop < len(chosen) and chosen[stop] == chosen[stop - 1] + 1:
            stop += 1
        low, high = max(chosen[start], first), min(chosen[stop - 1] + 1, last)
        if low < high:
            yield start + low - chosen[start], slice(low - first, high - first)
        start = stop


@dataclass(frozen=True)
class _Block:
    """Some rows of queries, and tiles of the keys that the window leaves to them."""

    rows: slice
    keys: list[slice]


@dataclass(frozen=True)
class _Call:
    """Some of a batch, or one packed sequence, in the dense form; query and key in their own dtype."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    query_mask: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    sink: Tensor | None
    rule: _Rule

    @classmethod
    def of(
        cls,
        part: _Part,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        query_mask: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
        rule: _Rule,
    ) -> _Call:
        sink = None if sinks is None else sinks.to(compute_dtype(query.dtype))[None, :, None, None]
        return cls(
            part.queries(query),
            part.keys(key),
            part.mask(mask),
            part.mask(query_mask),
            part.bias(bias),
            part.slopes(slopes),
            sink,
            rule,
        )

    def blocks(self, rows: slice) -> Iterator[_Block]:
        batch, heads, count, _ = self.query.shape
        keys, left, right = self.key.shape[2], self.rule.left, self.rule.right
        offset, each = keys - count, max(1, batch * heads)
        elements = _TILE_ELEMENTS.get(self.query.device.type, 1 << 22)
        width = max(_FEWEST_KEYS, elements // (each * _FEWEST_ROWS))
        height = max(_FEWEST_ROWS, elements // (each * max(1, min(width, keys))))
        for start in range(rows.start, rows.stop, height):
            stop = min(rows.stop, start + height)
            first = 0 if left < 0 else min(keys, max(0, start + offset - left))
            last = keys if right < 0 else min(keys, max(0, stop + offset + right))
            tiles = [slice(k, min(last, k + width)) for k in range(first, last, width)]
            yield _Block(slice(start, stop), tiles)

    def softmax(self, block: _Block) -> _Softmax:
        """The sums of the block's rows, and its tiles."""
        q = _grouped(self.query[:, :, block.rows].to(compute_dtype(self.query.dtype)), self.key.shape[1])
        size = (*self.query.shape[:2], block.rows.stop - block.rows.start, 1)
        top, total = q.new_full(size, -torch.inf), q.new_zeros(size)
        if self.sink is not None:
            top, total = self.sink.expand(size), q.new_ones(size)
        t = weights = None
        for keys in block.keys:
            logits = self._logits(q, block.rows, keys)
            before, top = top, torch.maximum(logits.amax(-1, keepdim=True), top)
            t, weights = _exp(logits, _finite(top))
            total = weights.sum(-1, keepdim=True) + total * torch.exp(before - _finite(top))
        top, total = _finite(top), torch.where(total == 0, 1.0, total)
        log_total = total.log()
        if self.query_mask is not None:
            padding = ~self.query_mask[:, None, block.rows, None]
            total, log_total = total.masked_fill(padding, torch.inf), log_total.masked_fill(padding, 0.0)
        sink = None if self.sink is None else (self.sink - top).clamp_min_(_LOWEST)

        def tiles() -> Iterator[tuple[slice, Tensor, Tensor]]:
            for keys in block.keys:
                if len(block.keys) == 1 and t is not None and weights is not None:
                    yield keys, t, weights
                else:
                    yield keys, *_exp(self._logits(q, block.rows, keys), top)

        return _Softmax(total, log_total, sink, tiles())

    def _logits(self, q: Tensor, rows: slice, keys: slice) -> Tensor:
        k = self.key[:, :, keys].to(q.dtype)
        heads, offset = self.query.shape[1], self.key.shape[2] - self.query.shape[2]
        return _logits(q, k, heads, rows, keys, offset, self.mask, self.bias, self.slopes, self.rule)[0]


class _Softmax(NamedTuple):
    """Rows of a softmax whose probabilities are exp(t) / total, where t is a logit's distance to the maximum.

    total is infinite for a query that does not count, and log_total, otherwise its logarithm, is 0; both are
    (B, H, rows, 1), as is t of the sink. A tile is its keys, t and exp(t), both (B, H, rows, keys).
    """

    total: Tensor
    log_total: Tensor
    sink: Tensor | None
    tiles: Iterator[tuple[slice, Tensor, Tensor]]


def _exp(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """t, in the memory of the logits, and exp(t). What is masked has a finite t, so that t * exp(t) is 0."""
    t = logits.sub_(top).clamp_min_(_LOWEST)
    return t, torch.exp(t)


def _finite(top: Tensor) -> Tensor:
    """For a row with no visible key: exp(-inf - 0) = 0, not NaN."""
    return torch.where(top == -torch.inf, 0.0, top)


def _add_statistics(
    call: _Call,
    block: _Block,
    top_k: int,
    entropy: Tensor,
    mass: Tensor,
    top_keys: Tensor,
    top_probabilities: Tensor,
) -> None:
    """Those of a block into views of the results, which are zero (keys -1) before.

    -sum(p log p) is log(total) - sum(p t): both terms are positive, and nothing cancels.
    """
    rows = block.rows
    best, names = top_probabilities[:, :, rows], top_keys[:, :, rows]
    total, log_total, sink, tiles = call.softmax(block)
    surprise = torch.zeros_like(total)
    if sink is not None:
        surprise -= sink * torch.exp(sink)
    for keys, t, weights in tiles:
        surprise -= t.mul_(weights).sum(-1, keepdim=True)
        p = weights.div_(total)
        mass[:, :, keys] += p.sum(2)
        if top_k:
            # The best of this tile, and then of these and those before.
            found, where = p.topk(min(top_k, p.shape[-1]), -1)
            best, order = torch.cat([best, found], -1).topk(top_k, -1)
            names = torch.cat([names, where + keys.start], -1).gather(-1, order)
    entropy[:, :, rows] = (log_total + surprise / total).squeeze(-1)
    if top_k:
        top_probabilities[:, :, rows], top_keys[:, :, rows] = best, names.masked_fill(best == 0, -1)
