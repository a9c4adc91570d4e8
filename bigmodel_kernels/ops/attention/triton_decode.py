r"""Attention of a few new tokens against a key-value cache in Triton, split over the keys.

    Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023.  Pages: Kwon et al., arXiv 2309.06180.

One query row per head would leave a tile of a matrix product nearly empty, and one program per head most of
the device. So a program takes all the rows that read one key head (query heads of its group x new tokens),
and only a part of the keys::

    rows of a tile:  (token 0, head 0) (token 0, head 1) ... (token 1, head 0) ...      group * Sq of them
    keys:            |<- split 0 ->|<- split 1 ->|<- split 2 ->|  of those that the rows see, at run time

Each split leaves its output, divided by its own sum, and its logsumexp in base 2; a second kernel adds them
with weights 2^(logsumexp - largest) in the order of the splits. In float32 (EXACT, see ``triton_logits``) the
base is e, and the rounding of a logsumexp would be most of the error: there a split leaves its undivided
output, its maximum and its sum. With one split the first kernel writes the result itself. The number of
splits depends on shapes alone, so nothing is read from the device first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import Target, cdiv, next_power_of_2, on_device, target_of
from ..product_triton import add_product
from .triton_logits import (
    divide,
    in_base,
    keys_seen,
    logits_of,
    power,
    register_limit,
    scale_arguments,
    strides_of,
    tile_width,
    window_arguments,
)


@triton.jit
def _finish(output, total, maximum, sink, HAS_SINKS: tl.constexpr, EXACT: tl.constexpr):
    """Output and natural logsumexp of rows whose ``total`` is in units of 2^maximum, or e^maximum."""
    if HAS_SINKS:
        new_maximum = tl.maximum(maximum, sink)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        correction = power(maximum - shift, EXACT)
        total = total * correction + power(sink - shift, EXACT)
        output = output * correction[:, None]
        maximum = new_maximum
    nothing_seen = total == 0.0
    safe_total = tl.where(nothing_seen, 1.0, total)
    if EXACT:
        logsumexp = tl.where(nothing_seen, float("-inf"), maximum + 0.6931471805599453 * tl.log2(safe_total))
    else:
        logsumexp = tl.where(
            nothing_seen, float("-inf"), 0.6931471805599453 * (maximum + tl.log2(safe_total))
        )
    return divide(output, safe_total[:, None], EXACT), logsumexp


@triton.jit
def attention_decode_kernel(
    query_ptr, key_ptr, value_ptr, seqlens_ptr, table_ptr, alibi_ptr, sinks_ptr, out_ptr, logsumexp_ptr,
    partial_ptr, partial_lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_nb, stride_tb, stride_tn, stride_ab, stride_ah, stride_sh, stride_ob, stride_oh, stride_om,
    heads, group, queries, page_size, head_dim, splits, batches,
    scale, softcap, window_left, window_right,
    PAGED: tl.constexpr, SPLIT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SCALE_LATE: tl.constexpr,
    EXACT: tl.constexpr, EVEN_D: tl.constexpr, CHUNK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    # Which rows of which key head of which sequence, and which part of its keys.
    program = tl.program_id(0)
    tiles = tl.cdiv(group * queries, TILE_M)
    split = program % splits
    tile = program // splits % tiles
    kv_head = program // (splits * tiles) % (heads // group)
    sequence = program // (splits * tiles * (heads // group))
    batch = sequence.to(tl.int64)
    kv_64 = kv_head.to(tl.int64)
    keys = tl.load(seqlens_ptr + sequence * stride_nb)
    offset = keys - queries

    member = tile * TILE_M + tl.arange(0, TILE_M)
    in_rows = member < group * queries
    row = member // group  # position among the new tokens
    head = kv_head * group + member % group
    row_64 = row.to(tl.int64)
    head_64 = head.to(tl.int64)
    dims = tl.arange(0, TILE_D)
    in_dims = dims < head_dim
    mask = in_rows[:, None] & in_dims[None, :]
    q_rows = query_ptr + batch * stride_qb + (head_64 * stride_qh + row_64 * stride_qm)
    if CHUNK == TILE_D:
        query = tl.load(q_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    else:
        # (parts, rows, CHUNK), for a product of each part: see `add_product` for why.
        parts = tl.arange(0, TILE_D // CHUNK) * CHUNK
        within = tl.arange(0, CHUNK)
        q_dims = parts[:, None, None] + within[None, None, :]
        k_dims = parts[:, None, None] + within[None, :, None]
        query = tl.load(
            q_rows[None, :, None] + q_dims, mask=in_rows[None, :, None] & (q_dims < head_dim), other=0.0
        )
    slope = 0.0
    if HAS_ALIBI:
        slopes = alibi_ptr + batch * stride_ab + head_64 * stride_ah
        slope = in_base(tl.load(slopes, mask=in_rows, other=0.0), EXACT)[:, None]
    key_ptr += kv_64 * stride_kh
    value_ptr += kv_64 * stride_vh
    if not PAGED:
        key_ptr += batch * stride_kb
        value_ptr += batch * stride_vb

    # This split's share of the keys that some row of the tile sees.
    first_row = tile * TILE_M // group
    last_row = tl.minimum((tile + 1) * TILE_M - 1, group * queries - 1) // group
    low, _full_low, _full_high, high = keys_seen(
        first_row, last_row, keys, offset, window_left, window_right, HAS_LEFT, HAS_RIGHT, TILE_N
    )
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), TILE_N) * TILE_N
    begin = low + split * share
    end = tl.minimum(begin + share, high)

    output = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    maximum = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    for start in range(begin, end, TILE_N):
        key = start + tl.arange(0, TILE_N)
        in_range = key < end
        if PAGED:  # where a key lies: its page, and its place there
            pages = table_ptr + batch * stride_tb + key // page_size * stride_tn
            page = tl.load(pages, mask=in_range, other=0).to(tl.int64)
            place = (key % page_size).to(tl.int64)
            k_place = page * stride_kb + place * stride_kn
            v_place = page * stride_vb + place * stride_vn
        else:
            k_place = key.to(tl.int64) * stride_kn
            v_place = key.to(tl.int64) * stride_vn
        v_mask = in_range[:, None]
        if not EVEN_D:
            v_mask = v_mask & in_dims[None, :]
        if CHUNK == TILE_D:
            k_mask = in_range[None, :]
            if not EVEN_D:
                k_mask = k_mask & in_dims[:, None]
            k = tl.load(key_ptr + k_place[None, :] + dims[:, None], mask=k_mask, other=0.0)
            products = tl.dot(query, k, input_precision="ieee")
        else:
            k_mask = in_range[None, None, :]
            if not EVEN_D:
                k_mask = k_mask & (k_dims < head_dim)
            k = tl.load(key_ptr + k_place[None, None, :] + k_dims, mask=k_mask, other=0.0)
            products = tl.sum(tl.dot(query, k, input_precision="ieee"), axis=0)
        logits, _ = logits_of(
            products, row[:, None], key[None, :], end, offset, 0.0, in_range[None, :],
            slope, scale, softcap, window_left, window_right,
            True, HAS_LEFT, HAS_RIGHT, False, False, HAS_SOFTCAP, HAS_ALIBI, not SCALE_LATE, EXACT,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        # A row that has seen nothing yet: subtract 0 instead of -inf, so that 2^(-inf) = 0, not NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        distance = logits - shift[:, None]  # all this: see the forward kernel
        if SCALE_LATE:
            distance *= scale
        weights = power(distance, True) if EXACT else tl.exp2(distance)
        step = maximum - shift
        if SCALE_LATE:
            step *= scale
        correction = power(step, True) if EXACT else tl.exp2(step)
        total = total * correction + tl.sum(weights, axis=1)
        v = tl.load(value_ptr + v_place[:, None] + dims[None, :], mask=v_mask, other=0.0)
        weights = weights.to(v.dtype)
        output = add_product(output * correction[:, None], weights, v, EXACT)
        maximum = new_maximum

    if SCALE_LATE:
        maximum = maximum * scale
    place = (batch * heads + head_64) * queries + row_64  # in (B, H, Sq)
    if SPLIT:
        if not EXACT:
            output, logsumexp = _finish(output, total, maximum, 0.0, False, False)
        rows_total = tl.cast(batches, tl.int64) * heads * queries
        place += split * rows_total
        if EXACT:
            tl.store(partial_lse_ptr + place, maximum, mask=in_rows)
            tl.store(partial_lse_ptr + splits * rows_total + place, total, mask=in_rows)
        else:
            tl.store(partial_lse_ptr + place, logsumexp * 1.4426950408889634, mask=in_rows)
        tl.store(partial_ptr + place[:, None] * head_dim + dims[None, :], output, mask=mask)
    else:
        sink = 0.0
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head_64 * stride_sh, mask=in_rows, other=0.0).to(tl.float32)
            sink = in_base(sink, EXACT)
        output, logsumexp = _finish(output, total, maximum, sink, HAS_SINKS, EXACT)
        tl.store(logsumexp_ptr + place, logsumexp, mask=in_rows)
        out_tile = out_ptr + batch * stride_ob + (head_64 * stride_oh + row_64 * stride_om)[:, None]
        tl.store(out_tile + dims[None, :], output.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_decode_combine_kernel(
    partial_ptr, partial_lse_ptr, sinks_ptr, out_ptr, logsumexp_ptr,
    stride_sh, stride_ob, stride_oh, stride_om, heads, queries, head_dim, splits, rows_total,
    HAS_SINKS: tl.constexpr, EXACT: tl.constexpr, TILE_M: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    # A few rows of (B, H, Sq).
    number = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_rows = number < rows_total
    row = number % queries
    head = number // queries % heads
    batch = number // queries // heads
    dims = tl.arange(0, TILE_D)
    mask = in_rows[:, None] & (dims < head_dim)[None, :]
    output = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    maximum = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    for split in range(0, splits):
        place = number + split * tl.cast(rows_total, tl.int64)
        lse = tl.load(partial_lse_ptr + place, mask=in_rows, other=float("-inf"))
        part = tl.load(partial_ptr + place[:, None] * head_dim + dims[None, :], mask=mask, other=0.0)
        new_maximum = tl.maximum(maximum, lse)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        correction = power(maximum - shift, EXACT)
        weight = power(lse - shift, EXACT)
        if EXACT:
            sum_place = partial_lse_ptr + splits * tl.cast(rows_total, tl.int64) + place
            total = total * correction + weight * tl.load(sum_place, mask=in_rows, other=0.0)
        else:
            total = total * correction + weight
        output = output * correction[:, None] + part * weight[:, None]
        maximum = new_maximum
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head * stride_sh, mask=in_rows, other=0.0).to(tl.float32)
        sink = in_base(sink, EXACT)
    output, logsumexp = _finish(output, total, maximum, sink, HAS_SINKS, EXACT)
    tl.store(logsumexp_ptr + number, logsumexp, mask=in_rows)
    out_tile = out_ptr + (batch * stride_ob + head * stride_oh + row * stride_om)[:, None] + dims[None, :]
    tl.store(out_tile, output.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launch ------------------------------------------------------------------------------------------------

_MOST_SPLITS = 64


def decode_tile(rows: int, head_dim: int, itemsize: int, target: Target) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages of a step, for ``rows`` rows that share a key head."""
    tile_d = tile_width(head_dim)
    tile_m = min(max(16, next_power_of_2(rows)), 32 if itemsize == 4 or tile_d > 128 else 64)
    tile_n = (64 if tile_d <= 64 else 32 if tile_d <= 128 else 16) if itemsize == 4 else 64
    if itemsize == 2 and tile_d > 128:
        tile_n = 32
    # 64 rows of a wide head are more accumulators than four warps have room for, but as a warpgroup.
    crowded = itemsize == 4 or (tile_m == 64 and not target.warpgroups)
    num_warps = 8 if tile_d >= 128 and crowded else 4
    # Float32 products leave no registers for a second stage.
    num_stages = 3 if itemsize == 2 else 2 if tile_d <= 64 else 1
    while num_stages > 1 and (tile_m + 2 * num_stages * tile_n) * tile_d * itemsize > target.shared_memory:
        num_stages -= 1
    return tile_m, tile_n, num_warps, num_stages


def decode_splits(programs: int, keys: int, tile_n: int, target: Target) -> int:
    """Parts of the keys: enough programs for two on each processor, but no part shorter than four tiles."""
    wanted = cdiv(2 * target.processors, max(1, programs))
    return max(1, min(wanted, cdiv(keys, 4 * tile_n), _MOST_SPLITS))


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
    """Output and logsumexp of ``bigmodel_kernels.attention_decode``."""
    batches, heads, rows, head_dim = query.shape
    kv_heads, page_size = key_cache.shape[1], key_cache.shape[2]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    out = query.new_empty((batches, rows, heads, head_dim)).transpose(1, 2)
    logsumexp = query.new_empty((batches, heads, rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, logsumexp
    group = heads // kv_heads
    target = target_of(query)
    tile_m, tile_n, num_warps, num_stages = decode_tile(group * rows, head_dim, query.element_size(), target)
    programs = cdiv(group * rows, tile_m) * kv_heads * batches
    splits = decode_splits(programs, capacity, tile_n, target)
    exact = query.dtype == torch.float32
    partial = partial_lse = None
    if splits > 1:
        partial = query.new_empty((splits, batches * heads * rows, head_dim), dtype=torch.float32)
        statistics = 2 if exact else 1
        partial_lse = query.new_empty((statistics, splits, batches * heads * rows), dtype=torch.float32)
    has_left, has_right, left, right = window_arguments(is_causal, window_left, window_right, rows, capacity)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(batches, heads)
    tile_d = tile_width(head_dim)
    with on_device(query):
        attention_decode_kernel[(programs * splits,)](
            query, key_cache, value_cache, cache_seqlens, block_table, alibi_slopes, sinks, out, logsumexp,
            partial, partial_lse, *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
            cache_seqlens.stride(0), *strides_of(block_table, 2), *strides_of(alibi_slopes, 2),
            *strides_of(sinks, 1), *out.stride()[:3],
            heads, group, rows, page_size, head_dim, splits, batches,
            *scale_arguments(softmax_scale, softcap, exact), left, right,
            PAGED=block_table is not None, SPLIT=splits > 1, HAS_LEFT=has_left, HAS_RIGHT=has_right,
            HAS_ALIBI=alibi_slopes is not None, HAS_SINKS=sinks is not None, HAS_SOFTCAP=softcap > 0,
            SCALE_LATE=alibi_slopes is None and softcap <= 0 and softmax_scale > 0,
            EXACT=exact, EVEN_D=tile_d == head_dim, CHUNK=min(tile_d, 16) if exact else tile_d,
            TILE_M=tile_m, TILE_N=tile_n, TILE_D=tile_d,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
            **register_limit(exact and target.tensor_memory, target),
        )  # fmt: skip
        if splits > 1:
            rows_total = batches * heads * rows
            combined = max(1, 1024 // tile_d)
            attention_decode_combine_kernel[(cdiv(rows_total, combined),)](
                partial, partial_lse, sinks, out, logsumexp, *strides_of(sinks, 1), *out.stride()[:3],
                heads, rows, head_dim, splits, rows_total,
                HAS_SINKS=sinks is not None, EXACT=exact, TILE_M=combined, TILE_D=tile_d, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out, logsumexp
