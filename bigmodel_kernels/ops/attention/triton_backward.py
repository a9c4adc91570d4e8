r"""The gradient of attention in Triton, with no tensor of Sq x Sk elements and the same bits in every run.

    Dao: FlashAttention-2, arXiv 2307.08691.

With P the probabilities, Z what dropout makes of them, and dO the gradient of the output::

    P  = 2^(S - logsumexp)                 recomputed, S the logits in base 2
    dZ = dO V^T,  dP = dropout(dZ)
    dS = P * (dP - delta)                  delta = rowsum(dO * O) - grad of logsumexp
    dV = Z^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K,  dbias = sum of dS,  dsinks = - sum of P_sink delta

Four kernels. None adds to memory that another program writes, so there are no atomics and no order to chance:

    delta   a tile of rows each; delta, the logsumexp in the base of S, and each tile's part of dsinks
    keys    a tile of keys (K, V and the sums of dK, dV stay in the core), a loop over the rows that see them
            and over the query heads that share them; its tiles are keys x rows, so that P^T and dS^T are
            left operands of a matrix product without leaving the registers::

                       rows ->  +------+------+------+------+
                   keys, ours:  | skip | mask | full | full |      (causal)
                                +------+------+------+------+

    rows    a tile of rows (Q, dO and the sum of dQ stay), a loop over the keys that they see
    bias    a tile of the bias, a loop over the sequences and heads that share it: a bias that is broadcast
            over them needs no larger tensor. A bias of one row or one column for all leaves one sum for each
            tile of rows or columns, added up afterwards

In float32 (EXACT, see ``triton_logits``) the base is e, and the rounding of the logsumexp would be most of
the error: the kernel for rows, which comes first, also sums each row's P, whose distance from 1 is that
rounding, and all divide by the sum.

The logits of a tile are computed in three kernels instead of once: seven matrix products (nine with a
gradient of the bias) where the atomics of one kernel would need five.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import Target, cdiv, on_device, target_of
from ..philox import threshold
from ..philox_triton import keep_attention
from ..product_triton import add_product
from ..side_by_side import empty_gradients
from .triton_logits import (
    MAX_HEAD_DIM,
    divide,
    in_base,
    keys_seen,
    load_tile,
    logits_of,
    long_product,
    power,
    register_limit,
    rows_seeing,
    scale_arguments,
    sequence_of,
    strides_of,
    tile_width,
    window_arguments,
)


@triton.jit
def attention_delta_kernel(
    out_ptr, grad_ptr, logsumexp_ptr, grad_lse_ptr, sinks_ptr, delta_ptr, lse_ptr, dsinks_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, stride_lm,
    stride_eb, stride_eh, stride_em, stride_sh,
    heads, rows_total, head_dim,
    HAS_GRAD_LSE: tl.constexpr, HAS_SINKS: tl.constexpr, EXACT: tl.constexpr,
    TILE_M: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(rows_total, TILE_M)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // (tiles * heads)).to(tl.int64)
    rows = tile * TILE_M + tl.arange(0, TILE_M)
    row_64 = rows.to(tl.int64)
    dims = tl.arange(0, TILE_D)
    row_mask = rows < rows_total
    mask = row_mask[:, None] & (dims < head_dim)[None, :]

    out_tile = out_ptr + batch * stride_ob + head * stride_oh + row_64[:, None] * stride_om + dims[None, :]
    grad_tile = grad_ptr + batch * stride_gb + head * stride_gh + row_64[:, None] * stride_gm + dims[None, :]
    out = tl.load(out_tile, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_tile, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * grad, axis=1)
    if HAS_GRAD_LSE:
        grad_lse = grad_lse_ptr + batch * stride_eb + head * stride_eh + row_64 * stride_em
        delta -= tl.load(grad_lse, mask=row_mask, other=0.0).to(tl.float32)
    lse_place = logsumexp_ptr + batch * stride_lb + head * stride_lh + row_64 * stride_lm
    lse = in_base(tl.load(lse_place, mask=row_mask, other=float("-inf")).to(tl.float32), EXACT)
    # A row that sees nothing: with +inf its probabilities come out as 2^(-inf) = 0, not as NaN.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    place = (batch * heads + head) * rows_total + row_64
    tl.store(delta_ptr + place, delta, mask=row_mask)
    tl.store(lse_ptr + place, lse, mask=row_mask)
    if HAS_SINKS:
        sink = in_base(tl.load(sinks_ptr + head * stride_sh).to(tl.float32), EXACT)
        part = tl.where(row_mask, power(sink - lse, EXACT) * delta, 0.0)
        tl.store(dsinks_ptr + program, -tl.sum(part, axis=0))


@triton.jit
def _tiles_of(low, full_low, full_high, high, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Tiles at the left edge of a range, and those that a loop takes: at both edges, or only between them."""
    left = tl.cdiv(tl.maximum(tl.minimum(full_low, high) - low, 0), TILE)
    if MASKED:
        return left, left + tl.cdiv(tl.maximum(high - full_high, 0), TILE)
    else:
        return left, (full_high - full_low) // TILE


@triton.jit
def _start_of(number, left, low, full_low, full_high, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Where a tile of :func:`_tiles_of` starts."""
    if MASKED:
        start = tl.where(number < left, low + number * TILE, full_high + (number - left) * TILE)
    else:
        start = full_low + number * TILE
    return tl.multiple_of(start, TILE)


@triton.jit
def _over_rows(
    dk, dv, k, v, k_rows, v_rows,
    query_ptr, grad_ptr, lse_ptr, delta_ptr, inverse_ptr, bias_ptr, alibi_ptr, shown,
    stride_qh, stride_qm, stride_gh, stride_gm, stride_bh, stride_bm, stride_ah, stride_lh,
    key, dims, low, full_low, full_high, high, queries, keys, offset, head_dim,
    scale, softcap, window_left, window_right,
    seed, least, keep_scale, first_key, first_head, group, sequence,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, CHUNK: tl.constexpr, EVEN_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """The loop of the kernel for keys: over tiles of rows that see all the keys, or, MASKED, the others.

    The query heads that read these keys are in the same loop: with a loop of their own around it, what that
    keeps in registers spilled.
    """
    local_rows = tl.arange(0, TILE_M)
    in_dims = dims < head_dim
    left, tiles = _tiles_of(low, full_low, full_high, high, MASKED, TILE_M)
    for number in range(0, group * tiles):
        start = _start_of(number % tiles, left, low, full_low, full_high, MASKED, TILE_M)
        head = first_head + number // tiles
        head_64 = tl.cast(head, tl.int64)
        start_m = tl.cast(start, tl.int64)  # start * stride may pass 2^31
        row = start + local_rows
        in_range = row < queries
        q_rows = query_ptr + (head_64 * stride_qh + start_m * stride_qm) + local_rows * stride_qm
        if CHUNK == TILE_D:
            q = load_tile(q_rows[:, None] + dims[None, :], in_range, in_dims, MASKED, EVEN_D)
        statistics = head_64 * stride_lh + row
        # Rows past the end: 2^(S - inf) = 0, so nothing of theirs counts.
        if MASKED:
            lse = tl.load(lse_ptr + statistics, mask=in_range, other=float("inf"))
        else:
            lse = tl.load(lse_ptr + statistics)
        bias = 0.0
        if HAS_BIAS:
            b_tile = bias_ptr + (head_64 * stride_bh + start_m * stride_bm)
            in_tile = (key < keys)[:, None]
            if MASKED:
                in_tile = in_tile & in_range[None, :]
            bias = tl.load(b_tile + local_rows[None, :] * stride_bm, mask=in_tile, other=0.0)
        slope = 0.0
        if HAS_ALIBI:
            slope = in_base(tl.load(alibi_ptr + head_64 * stride_ah), EXACT)

        if CHUNK == TILE_D:
            products = tl.dot(k, tl.trans(q), input_precision="ieee")
        else:
            products = long_product(
                k_rows, q_rows, key < keys, in_range, head_dim, TILE_N, TILE_M, TILE_D, CHUNK
            )
        logits, bounded = logits_of(
            products, row[None, :], key[:, None], keys, offset, bias, shown,
            slope, scale, softcap, window_left, window_right,
            MASKED, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_SOFTCAP, HAS_ALIBI, True, EXACT,
        )  # fmt: skip
        p = power(logits - lse[None, :], EXACT)
        if EXACT:
            p *= tl.load(inverse_ptr + statistics, mask=in_range, other=0.0)[None, :]
        grad_rows = grad_ptr + (head_64 * stride_gh + start_m * stride_gm) + local_rows * stride_gm
        if CHUNK == TILE_D:
            grad = load_tile(grad_rows[:, None] + dims[None, :], in_range, in_dims, MASKED, EVEN_D)
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        else:
            dp = long_product(
                v_rows, grad_rows, key < keys, in_range, head_dim, TILE_N, TILE_M, TILE_D, CHUNK
            )
            grad = load_tile(grad_rows[:, None] + dims[None, :], in_range, in_dims, MASKED, EVEN_D)
        if HAS_DROPOUT:  # dv is multiplied by keep_scale at the end
            kept = keep_attention(seed, least, start, first_key, head, sequence, TILE_M, TILE_N, True)
            dv = add_product(dv, tl.where(kept, p, 0.0).to(grad.dtype), grad, EXACT)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        else:
            dv = add_product(dv, p.to(grad.dtype), grad, EXACT)
        if MASKED:
            delta = tl.load(delta_ptr + statistics, mask=in_range, other=0.0)
        else:
            delta = tl.load(delta_ptr + statistics)
        ds = p * (dp - delta[None, :])
        if HAS_SOFTCAP:
            ds *= 1.0 - bounded * bounded
        if CHUNK != TILE_D:
            q = load_tile(q_rows[:, None] + dims[None, :], in_range, in_dims, MASKED, EVEN_D)
        dk = add_product(dk, ds.to(q.dtype), q, EXACT)
    return dk, dv


@triton.jit
def attention_backward_keys_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, inverse_ptr,
    padding_ptr, bias_ptr, cu_q_ptr, cu_k_ptr, seed_ptr, alibi_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_pb, stride_pn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_ab, stride_ah, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_lb, stride_lh,
    heads, group, rows_total, keys_total, head_dim,
    softmax_scale, scale, softcap, window_left, window_right, least, keep_scale,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, CHUNK: tl.constexpr, EVEN_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    # Which keys of which head. Under a causal mask the first keys are seen by the most rows and start first.
    program = tl.program_id(0)
    tiles = tl.cdiv(keys_total, TILE_N)
    tile = program % tiles
    kv_heads = heads // group
    kv_head = program // tiles % kv_heads
    sequence = program // (tiles * kv_heads)
    first_key = tile * TILE_N
    batch = sequence.to(tl.int64)
    first_q, first_k, queries, keys = sequence_of(
        cu_q_ptr, cu_k_ptr, sequence, rows_total, keys_total, VARLEN
    )
    if first_key >= keys:
        return

    local_keys = tl.arange(0, TILE_N)
    key = first_key + local_keys
    key_64 = first_key.to(tl.int64)
    kv_64 = kv_head.to(tl.int64)
    dims = tl.arange(0, TILE_D)
    in_dims = dims < head_dim
    in_keys = key < keys
    key_ptr += batch * stride_kb + kv_64 * stride_kh + (first_k + key_64) * stride_kn
    value_ptr += batch * stride_vb + kv_64 * stride_vh + (first_k + key_64) * stride_vn
    # Keys past the end are zero. What they give is never stored, and mixes with no other key.
    k_rows = key_ptr + local_keys * stride_kn
    v_rows = value_ptr + local_keys * stride_vn
    k, v = 0, 0
    if CHUNK == TILE_D:
        k = load_tile(k_rows[:, None] + dims[None, :], in_keys, in_dims, True, EVEN_D)
        v = load_tile(v_rows[:, None] + dims[None, :], in_keys, in_dims, True, EVEN_D)
    shown = in_keys[:, None]
    if HAS_PADDING:
        padding = padding_ptr + batch * stride_pb + key_64 * stride_pn + local_keys * stride_pn
        shown = (tl.load(padding, mask=in_keys, other=0) != 0)[:, None]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    offset = keys - queries
    low, full_low, full_high, high = rows_seeing(
        first_key, tl.minimum(first_key + TILE_N, keys) - 1, queries, offset, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, TILE_M,
    )  # fmt: skip

    query_ptr += batch * stride_qb + first_q * stride_qm
    grad_ptr += batch * stride_gb + first_q * stride_gm
    lse_ptr += batch * stride_lb + first_q
    delta_ptr += batch * stride_lb + first_q
    if EXACT:
        inverse_ptr += batch * stride_lb + first_q
    if HAS_BIAS:
        bias_ptr += batch * stride_bb + key_64 * stride_bn
        bias_ptr = bias_ptr + local_keys[:, None].to(tl.int64) * stride_bn
    if HAS_ALIBI:
        alibi_ptr += batch * stride_ab
    dk = tl.zeros((TILE_N, TILE_D), dtype=tl.float32)
    dv = tl.zeros((TILE_N, TILE_D), dtype=tl.float32)
    dk, dv = _over_rows(  # at the edges of the window and the end of the rows
        dk, dv, k, v, k_rows, v_rows,
        query_ptr, grad_ptr, lse_ptr, delta_ptr, inverse_ptr, bias_ptr, alibi_ptr, shown,
        stride_qh, stride_qm, stride_gh, stride_gm, stride_bh, stride_bm, stride_ah, stride_lh,
        key, dims, low, full_low, full_high, high, queries, keys, offset, head_dim,
        scale, softcap, window_left, window_right,
        seed, least, keep_scale, first_key, kv_head * group, group, sequence,
        True, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_DROPOUT,
        EXACT, CHUNK, EVEN_D, TILE_M, TILE_N, TILE_D,
    )  # fmt: skip
    dk, dv = _over_rows(  # whole tiles of rows that see all of the keys
        dk, dv, k, v, k_rows, v_rows,
        query_ptr, grad_ptr, lse_ptr, delta_ptr, inverse_ptr, bias_ptr, alibi_ptr, shown,
        stride_qh, stride_qm, stride_gh, stride_gm, stride_bh, stride_bm, stride_ah, stride_lh,
        key, dims, low, full_low, full_high, high, queries, keys, offset, head_dim,
        scale, softcap, window_left, window_right,
        seed, least, keep_scale, first_key, kv_head * group, group, sequence,
        False, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_DROPOUT,
        EXACT, CHUNK, EVEN_D, TILE_M, TILE_N, TILE_D,
    )  # fmt: skip

    dk = dk * softmax_scale
    if HAS_DROPOUT:
        dv = dv * keep_scale
    mask = in_keys[:, None] & in_dims[None, :]
    dk_ptr += batch * stride_dkb + kv_64 * stride_dkh + (first_k + key_64) * stride_dkn
    dv_ptr += batch * stride_dvb + kv_64 * stride_dvh + (first_k + key_64) * stride_dvn
    dk_tile = dk_ptr + local_keys[:, None] * stride_dkn + dims[None, :]
    dv_tile = dv_ptr + local_keys[:, None] * stride_dvn + dims[None, :]
    tl.store(dk_tile, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _over_keys(
    dq, total, q, grad, q_rows, grad_rows, in_rows, lse, delta,
    key_ptr, value_ptr, padding_ptr, bias_ptr,
    stride_kn, stride_vn, stride_pn, stride_bn,
    row, dims, low, full_low, full_high, high, keys, offset, head_dim,
    slope, scale, softcap, window_left, window_right,
    seed, least, keep_scale, first_row, head, sequence,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, CHUNK: tl.constexpr, EVEN_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """The loop of the kernel for rows: over tiles of keys that all the rows see, or, MASKED, the others."""
    local_keys = tl.arange(0, TILE_N)
    in_dims = dims < head_dim
    left, tiles = _tiles_of(low, full_low, full_high, high, MASKED, TILE_N)
    for number in range(0, tiles):
        start = _start_of(number, left, low, full_low, full_high, MASKED, TILE_N)
        start_n = tl.cast(start, tl.int64)  # start * stride may pass 2^31
        key = start + local_keys
        in_range = key < keys
        k_rows = key_ptr + start_n * stride_kn + local_keys * stride_kn
        if CHUNK == TILE_D:
            k = load_tile(k_rows[:, None] + dims[None, :], in_range, in_dims, MASKED, EVEN_D)
        bias = 0.0
        if HAS_BIAS:
            b_tile = bias_ptr + start_n * stride_bn + local_keys[None, :] * stride_bn
            if MASKED:  # noqa: SIM108, a branch at compile time
                bias = tl.load(b_tile, mask=in_range[None, :], other=0.0)
            else:
                bias = tl.load(b_tile)
        shown = in_range[None, :]
        if HAS_PADDING:
            padding = padding_ptr + start_n * stride_pn + local_keys * stride_pn
            shown = (tl.load(padding, mask=in_range, other=0) != 0)[None, :]

        if CHUNK == TILE_D:
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            products = long_product(
                q_rows, k_rows, in_rows, in_range, head_dim, TILE_M, TILE_N, TILE_D, CHUNK
            )
        logits, bounded = logits_of(
            products, row[:, None], key[None, :], keys, offset, bias, shown,
            slope, scale, softcap, window_left, window_right,
            MASKED, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_SOFTCAP, HAS_ALIBI, True, EXACT,
        )  # fmt: skip
        p = power(logits - lse[:, None], EXACT)
        if EXACT:
            total += tl.sum(p, axis=1)
        v_rows = value_ptr + start_n * stride_vn + local_keys * stride_vn
        if CHUNK == TILE_D:
            v = load_tile(v_rows[:, None] + dims[None, :], in_range, in_dims, MASKED, EVEN_D)
            dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        else:
            dp = long_product(grad_rows, v_rows, in_rows, in_range, head_dim, TILE_M, TILE_N, TILE_D, CHUNK)
        if HAS_DROPOUT:
            kept = keep_attention(seed, least, first_row, start, head, sequence, TILE_M, TILE_N, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds *= 1.0 - bounded * bounded
        if CHUNK != TILE_D:
            k = load_tile(k_rows[:, None] + dims[None, :], in_range, in_dims, MASKED, EVEN_D)
        dq = add_product(dq, ds.to(k.dtype), k, EXACT)
    return dq, total


@triton.jit
def attention_backward_rows_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, inverse_ptr,
    padding_ptr, bias_ptr, cu_q_ptr, cu_k_ptr, seed_ptr, alibi_ptr, sinks_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_pb, stride_pn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_ab, stride_ah, stride_sh, stride_dqb, stride_dqh, stride_dqm, stride_lb, stride_lh,
    heads, group, rows_total, keys_total, head_dim,
    softmax_scale, scale, softcap, window_left, window_right, least, keep_scale,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_SINKS: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr, EVEN_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    # Which rows of which head, in the forward's order: under a causal mask the last rows start first.
    program = tl.program_id(0)
    tiles = tl.cdiv(rows_total, TILE_M)
    tile = program % tiles
    if HAS_RIGHT:
        tile = tiles - 1 - tile
    head = program // tiles % heads
    sequence = program // (tiles * heads)
    first_row = tile * TILE_M
    batch = sequence.to(tl.int64)
    first_q, first_k, queries, keys = sequence_of(
        cu_q_ptr, cu_k_ptr, sequence, rows_total, keys_total, VARLEN
    )
    if first_row >= queries:
        return

    local_rows = tl.arange(0, TILE_M)
    row = first_row + local_rows
    row_64 = first_row.to(tl.int64)
    head_64 = head.to(tl.int64)
    kv_64 = (head // group).to(tl.int64)
    dims = tl.arange(0, TILE_D)
    in_dims = dims < head_dim
    in_rows = row < queries
    query_ptr += batch * stride_qb + head_64 * stride_qh + (first_q + row_64) * stride_qm
    grad_ptr += batch * stride_gb + head_64 * stride_gh + (first_q + row_64) * stride_gm
    key_ptr += batch * stride_kb + kv_64 * stride_kh + first_k * stride_kn
    value_ptr += batch * stride_vb + kv_64 * stride_vh + first_k * stride_vn
    q_rows = query_ptr + local_rows * stride_qm
    grad_rows = grad_ptr + local_rows * stride_gm
    q, grad = 0, 0
    if CHUNK == TILE_D:
        q = load_tile(q_rows[:, None] + dims[None, :], in_rows, in_dims, True, EVEN_D)
        grad = load_tile(grad_rows[:, None] + dims[None, :], in_rows, in_dims, True, EVEN_D)
    statistics = batch * stride_lb + head_64 * stride_lh + first_q + row
    lse = tl.load(lse_ptr + statistics, mask=in_rows, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=in_rows, other=0.0)
    if HAS_PADDING:
        padding_ptr += batch * stride_pb
    if HAS_BIAS:  # rows past the end read the bias of the last row
        bias_row = tl.minimum(row, queries - 1).to(tl.int64)
        bias_ptr = bias_ptr + batch * stride_bb + head_64 * stride_bh + bias_row[:, None] * stride_bm
    slope = 0.0
    if HAS_ALIBI:
        slope = in_base(tl.load(alibi_ptr + batch * stride_ab + head_64 * stride_ah), EXACT)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    offset = keys - queries
    low, full_low, full_high, high = keys_seen(
        first_row, tl.minimum(first_row + TILE_M, queries) - 1, keys, offset, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, TILE_N,
    )  # fmt: skip

    dq = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    if EXACT and HAS_SINKS:
        sink = in_base(tl.load(sinks_ptr + head_64 * stride_sh).to(tl.float32), EXACT)
        total += power(sink - lse, EXACT)
    dq, total = _over_keys(  # whole tiles that every row sees
        dq, total, q, grad, q_rows, grad_rows, in_rows, lse, delta,
        key_ptr, value_ptr, padding_ptr, bias_ptr,
        stride_kn, stride_vn, stride_pn, stride_bn, row, dims, low, full_low, full_high, high, keys,
        offset, head_dim, slope, scale, softcap, window_left, window_right,
        seed, least, keep_scale, first_row, head, sequence,
        False, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_DROPOUT,
        EXACT, CHUNK, EVEN_D, TILE_M, TILE_N, TILE_D,
    )  # fmt: skip
    dq, total = _over_keys(  # at the edges of the window and the end of the keys
        dq, total, q, grad, q_rows, grad_rows, in_rows, lse, delta,
        key_ptr, value_ptr, padding_ptr, bias_ptr,
        stride_kn, stride_vn, stride_pn, stride_bn, row, dims, low, full_low, full_high, high, keys,
        offset, head_dim, slope, scale, softcap, window_left, window_right,
        seed, least, keep_scale, first_row, head, sequence,
        True, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_DROPOUT,
        EXACT, CHUNK, EVEN_D, TILE_M, TILE_N, TILE_D,
    )  # fmt: skip

    dq = dq * softmax_scale
    if EXACT:
        inverse = divide(1.0, tl.where(total == 0.0, 1.0, total), EXACT)
        tl.store(inverse_ptr + statistics, inverse, mask=in_rows)
        dq = dq * inverse[:, None]
    dq_ptr += batch * stride_dqb + head_64 * stride_dqh + (first_q + row_64) * stride_dqm
    dq_tile = dq_ptr + local_rows[:, None] * stride_dqm + dims[None, :]
    mask = in_rows[:, None] & in_dims[None, :]
    tl.store(dq_tile, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_backward_bias_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, inverse_ptr,
    padding_ptr, bias_ptr, seed_ptr, alibi_ptr, dbias_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_pb, stride_pn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_ab, stride_ah, stride_db, stride_dh, stride_dm, stride_dn, stride_lb, stride_lh,
    batches, heads, bias_heads, group, queries, keys, head_dim,
    scale, softcap, window_left, window_right, least, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALL_BATCHES: tl.constexpr, ALL_HEADS: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_KEYS: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    # Which tile of which part of the bias.
    program = tl.program_id(0)
    tiles_n = tl.cdiv(keys, TILE_N)
    tiles_m = tl.cdiv(queries, TILE_M)
    tile_n = program % tiles_n
    tile_m = program // tiles_n % tiles_m
    bias_head = program // (tiles_n * tiles_m) % bias_heads
    bias_batch = program // (tiles_n * tiles_m * bias_heads)
    first_row = tile_m * TILE_M
    first_key = tile_n * TILE_N
    row = first_row + tl.arange(0, TILE_M)
    key = first_key + tl.arange(0, TILE_N)
    dims = tl.arange(0, TILE_D)
    in_rows = row < queries
    in_keys = key < keys
    in_dims = dims < head_dim
    row_64 = row.to(tl.int64)
    key_64 = key.to(tl.int64)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    offset = keys - queries

    first_sequence = 0 if ALL_BATCHES else bias_batch
    first_head = 0 if ALL_HEADS else bias_head
    sharing_heads = heads if ALL_HEADS else 1
    sharing = sharing_heads * batches if ALL_BATCHES else sharing_heads
    if HAS_RIGHT and first_key > tl.minimum(first_row + TILE_M, queries) - 1 + offset + window_right:
        sharing = 0  # no row sees any of these keys
    if HAS_LEFT and tl.minimum(first_key + TILE_N, keys) - 1 < first_row + offset - window_left:
        sharing = 0
    dbias = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for number in range(0, sharing):
        sequence = first_sequence + number // sharing_heads
        head = first_head + number % sharing_heads
        batch = tl.cast(sequence, tl.int64)
        head_64 = tl.cast(head, tl.int64)
        kv_64 = tl.cast(head // group, tl.int64)
        q_rows = query_ptr + batch * stride_qb + head_64 * stride_qh + row_64 * stride_qm
        k_rows = key_ptr + batch * stride_kb + kv_64 * stride_kh + key_64 * stride_kn
        g_rows = grad_ptr + batch * stride_gb + head_64 * stride_gh + row_64 * stride_gm
        v_rows = value_ptr + batch * stride_vb + kv_64 * stride_vh + key_64 * stride_vn
        if CHUNK == TILE_D:
            q = load_tile(q_rows[:, None] + dims[None, :], in_rows, in_dims, True, EVEN_D)
            k = load_tile(k_rows[:, None] + dims[None, :], in_keys, in_dims, True, EVEN_D)
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            grad = load_tile(g_rows[:, None] + dims[None, :], in_rows, in_dims, True, EVEN_D)
            v = load_tile(v_rows[:, None] + dims[None, :], in_keys, in_dims, True, EVEN_D)
            dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        else:
            products = long_product(q_rows, k_rows, in_rows, in_keys, head_dim, TILE_M, TILE_N, TILE_D, CHUNK)
            dp = long_product(g_rows, v_rows, in_rows, in_keys, head_dim, TILE_M, TILE_N, TILE_D, CHUNK)
        b_tile = bias_ptr + batch * stride_bb + head_64 * stride_bh + row_64[:, None] * stride_bm
        bias = tl.load(
            b_tile + key_64[None, :] * stride_bn, mask=in_rows[:, None] & in_keys[None, :], other=0.0
        )
        shown = in_keys[None, :]
        if HAS_PADDING:
            padding = padding_ptr + batch * stride_pb + key_64 * stride_pn
            shown = (tl.load(padding, mask=in_keys, other=0) != 0)[None, :]
        slope = 0.0
        if HAS_ALIBI:
            slope = in_base(tl.load(alibi_ptr + batch * stride_ab + head_64 * stride_ah), EXACT)
        logits, _ = logits_of(
            products, row[:, None], key[None, :], keys, offset, bias, shown,
            slope, scale, softcap, window_left, window_right,
            True, HAS_LEFT, HAS_RIGHT, HAS_PADDING, True, HAS_SOFTCAP, HAS_ALIBI, True, EXACT,
        )  # fmt: skip
        statistics = batch * stride_lb + head_64 * stride_lh + row_64
        lse = tl.load(lse_ptr + statistics, mask=in_rows, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=in_rows, other=0.0)
        if HAS_DROPOUT:
            kept = keep_attention(seed, least, first_row, first_key, head, sequence, TILE_M, TILE_N, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        p = power(logits - lse[:, None], EXACT)
        if EXACT:
            p *= tl.load(inverse_ptr + statistics, mask=in_rows, other=0.0)[:, None]
        dbias += p * (dp - delta[:, None])

    dbias_ptr += bias_batch.to(tl.int64) * stride_db + bias_head.to(tl.int64) * stride_dh
    if SUM_ROWS and SUM_KEYS:
        place = dbias_ptr + tile_m.to(tl.int64) * stride_dm + tile_n.to(tl.int64) * stride_dn
        tl.store(place, tl.sum(tl.sum(dbias, axis=1), axis=0))
    elif SUM_ROWS:
        place = dbias_ptr + tile_m.to(tl.int64) * stride_dm + key_64 * stride_dn
        tl.store(place, tl.sum(dbias, axis=0), mask=in_keys)
    elif SUM_KEYS:
        place = dbias_ptr + row_64 * stride_dm + tile_n.to(tl.int64) * stride_dn
        tl.store(place, tl.sum(dbias, axis=1), mask=in_rows)
    else:
        place = dbias_ptr + row_64[:, None] * stride_dm + key_64[None, :] * stride_dn
        mask = in_rows[:, None] & in_keys[None, :]
        tl.store(place, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)


# ---- launch ------------------------------------------------------------------------------------------------


class BackwardTile(NamedTuple):
    """Rows and keys of a step, and how a program executes it."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


class BackwardTiles(NamedTuple):
    """The tiles of the three kernels with matrix products."""

    keys: BackwardTile
    rows: BackwardTile
    bias: BackwardTile
    chunk: int = MAX_HEAD_DIM
    """Columns that a product over head_dim takes at a time."""


# Rows, keys, warps and stages, by what multiplies (a device's family and the operands) and head_dim up to.
# Heavy are logits that go through more than a scale and a mask. Chosen with ``triton_build``, which needs no
# device. The larger the tile that stays in the core (of keys in the kernel for keys, of rows in the kernel
# for rows), the fewer passes over memory: the largest whose shared memory fits, and from which no case spills
# on any device of the family; among the heavy ones are cases with every feature at once. Ampere's need no
# more than the 99 KiB of its smaller descendants (sm_86, sm_89, sm_120). None has been timed on a device.
_TILES: dict[tuple[str, int], tuple[tuple[int, int, int, int], ...]] = {
    # for keys: plain, heavy; for rows: plain, heavy; for the bias
    ("ampere", 64): ((64, 128, 8, 2), (32, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 1)),
    ("ampere", 128): ((64, 64, 8, 2), (32, 64, 8, 1), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    ("ampere", 256): ((16, 64, 8, 2), (16, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (16, 32, 4, 1)),
    ("hopper", 64): ((64, 128, 8, 2), (32, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 1)),
    ("hopper", 128): ((32, 128, 8, 2), (16, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1)),
    # Tiles of a warpgroup's 64 keys spill here: products of single warps.
    ("hopper", 256): ((32, 32, 8, 2), (32, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 1), (64, 32, 8, 1)),
    ("blackwell", 64): ((64, 128, 8, 2), (32, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1)),
    ("blackwell", 128): ((64, 128, 8, 2), (32, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1)),
    ("blackwell", 256): ((32, 64, 8, 2), (32, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1)),
    ("mi300", 64): ((64, 64, 4, 2), (32, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 1)),
    ("mi300", 128): ((32, 64, 4, 2), (32, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2), (128, 64, 8, 1)),
    ("mi300", 256): ((16, 64, 8, 1), (16, 64, 8, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 64, 4, 1)),
    # Full-precision float32 products: NVIDIA's ordinary arithmetic units, whatever the generation.
    ("float32", 64): ((32, 64, 8, 1), (32, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("float32", 128): ((32, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
    ("float32", 256): ((16, 32, 8, 1), (16, 16, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("mi300 float32", 64): ((32, 64, 8, 1), (16, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 1)),
    ("mi300 float32", 128): ((16, 32, 4, 1), (16, 16, 4, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
    ("mi300 float32", 256): ((16, 32, 8, 1), (16, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
}  # fmt: skip
_CHUNK = {"float32": 32, "mi300 float32": 64}


def backward_tiles(head_dim: int, itemsize: int, target: Target, heavy: bool) -> BackwardTiles:
    """Tiles of the backward kernels; ``heavy``: logits go through more than a scale and a mask."""
    if target.warp == 64:
        family = "mi300 float32" if itemsize == 4 else "mi300"
    elif itemsize == 4:
        family = "float32"
    elif target.tensor_memory:
        family = "blackwell"
    else:
        family = "hopper" if target.warpgroups else "ampere"
    tiles = [BackwardTile(*tile) for tile in _TILES[family, max(64, tile_width(head_dim))]]
    keys, rows = tiles[0:2], tiles[2:4]
    return BackwardTiles(keys[heavy], rows[heavy], tiles[4], chunk=_CHUNK.get(family, MAX_HEAD_DIM))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias and sinks; the last two are (0,) when they are not wanted.

    Deterministic whether asked or not. ``side_by_side``: the first three are parts of one tensor. Memory
    beyond the results: 8 bytes for each row of each head, 12 in float32.
    """
    head_dim = query.shape[-1]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        varlen = True
        heads = query.shape[1]
        sequences, rows, keys, kv_heads = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k, key.shape[1]
    else:
        varlen = False
        sequences, heads, rows, _ = query.shape
        kv_heads, keys = key.shape[1], key.shape[2]
    dq, dk, dv = empty_gradients(query, key, value, side_by_side)
    nothing = query.new_empty(0)
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else nothing
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None and sinks_require_grad else nothing
    if query.numel() == 0 or rows == 0:
        return dq, dk.zero_(), dv.zero_(), dbias.zero_(), dsinks.zero_()

    has_left, has_right, left, right = window_arguments(is_causal, window_left, window_right, rows, keys)
    # A packed tensor is a dense one of stride 0 over the sequences.
    strides = {
        name: (0, t.stride(1), t.stride(0)) if varlen else t.stride()[:3]
        for name, t in (
            ("q", query), ("k", key), ("v", value), ("g", grad_out), ("o", out), ("dq", dq), ("dk", dk),
            ("dv", dv),
        )
    }  # fmt: skip

    # Packed rows need no sequences here: the kernel for delta takes them as one.
    batches, length = (1, query.shape[0]) if varlen else (sequences, rows)
    exact = query.dtype == torch.float32
    lse, delta = query.new_empty((2, batches, heads, length), dtype=torch.float32)
    inverse = torch.empty_like(delta) if exact else None
    tile_d = tile_width(head_dim)
    tile_m = min(64, max(16, 2048 // tile_d))  # of the kernel for delta: few registers for any width
    tiles = cdiv(length, tile_m)
    parts = query.new_empty((batches, heads, tiles) if sinks_require_grad else 0, dtype=torch.float32)
    sum_strides, grad_sum_strides = (
        (0,) * (3 - (0 if t is None else t.dim())) + (() if t is None else tuple(t.stride()))
        for t in (logsumexp, grad_logsumexp)
    )
    with on_device(query):
        attention_delta_kernel[(tiles * heads * batches,)](
            out, grad_out, logsumexp, grad_logsumexp, sinks if sinks_require_grad else None,
            delta, lse, parts, *strides["o"], *strides["g"], *sum_strides, *grad_sum_strides,
            *strides_of(sinks, 1), heads, length, head_dim,
            HAS_GRAD_LSE=grad_logsumexp is not None, HAS_SINKS=sinks_require_grad, EXACT=exact,
            TILE_M=tile_m, TILE_D=tile_d, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        if sinks is not None and sinks_require_grad:
            dsinks = parts.sum((0, 2)).to(sinks.dtype)

        full_bias = None if bias is None else bias.expand(sequences, heads, rows, keys)
        if alibi_slopes is not None:
            alibi_slopes = alibi_slopes.expand(sequences, heads)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(torch.uint8)
        heavy = any(t is not None for t in (bias, alibi_slopes, dropout_seed)) or softcap > 0
        target = target_of(query)
        choice = backward_tiles(head_dim, query.element_size(), target, heavy)
        chunk = min(tile_d, choice.chunk)
        inputs = (query, key, value, grad_out, lse, delta, inverse, key_padding_mask, full_bias)
        lengths = (cu_seqlens_q, cu_seqlens_k)
        input_strides = (
            *strides["q"], *strides["k"], *strides["v"], *strides["g"], *strides_of(key_padding_mask, 2),
            *strides_of(full_bias, 4), *strides_of(alibi_slopes, 2),
        )  # fmt: skip
        statistics = (0 if varlen else heads * rows, length)
        sizes = (heads, heads // kv_heads, rows, keys, head_dim)
        scales = (
            *scale_arguments(softmax_scale, softcap, exact), left, right,
            threshold(dropout_p), 1 / (1 - dropout_p),
        )  # fmt: skip
        features: dict[str, Any] = {
            "HAS_LEFT": has_left,
            "HAS_RIGHT": has_right,
            "HAS_PADDING": key_padding_mask is not None,
            "HAS_ALIBI": alibi_slopes is not None,
            "HAS_SOFTCAP": softcap > 0,
            "HAS_DROPOUT": dropout_seed is not None,
            "EXACT": exact,
            "CHUNK": chunk,
            "EVEN_D": tile_d == head_dim,
            "TILE_D": tile_d,
        }

        limit = register_limit(exact, target)
        tile = choice.rows
        attention_backward_rows_kernel[(cdiv(rows, tile.tile_m) * heads * sequences,)](
            *inputs, *lengths, dropout_seed, alibi_slopes, sinks, dq,
            *input_strides, *strides_of(sinks, 1), *strides["dq"], *statistics,
            *sizes, softmax_scale, *scales, VARLEN=varlen, HAS_BIAS=bias is not None,
            HAS_SINKS=sinks is not None, **features,
            TILE_M=tile.tile_m, TILE_N=tile.tile_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
            enable_fp_fusion=True, **limit,
        )  # fmt: skip
        tile = choice.keys
        if keys:
            attention_backward_keys_kernel[(cdiv(keys, tile.tile_n) * kv_heads * sequences,)](
                *inputs, *lengths, dropout_seed, alibi_slopes, dk, dv,
                *input_strides, *strides["dk"], *strides["dv"], *statistics,
                *sizes, softmax_scale, *scales, VARLEN=varlen, HAS_BIAS=bias is not None,
                **features,
                TILE_M=tile.tile_m, TILE_N=tile.tile_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
                enable_fp_fusion=True, **limit,
            )  # fmt: skip
        if bias is not None and bias_requires_grad and not keys:
            dbias.zero_()
        elif bias is not None and bias_requires_grad:
            tile = choice.bias
            tiles_m, tiles_n = cdiv(rows, tile.tile_m), cdiv(keys, tile.tile_n)
            shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
            sum_rows, sum_keys = shape[2] == 1 and rows > 1, shape[3] == 1 and keys > 1
            result = dbias.view(shape)
            if sum_rows or sum_keys:
                size = (*shape[:2], tiles_m if sum_rows else rows, tiles_n if sum_keys else keys)
                result = query.new_empty(size, dtype=torch.float32)
            attention_backward_bias_kernel[(tiles_m * tiles_n * shape[1] * shape[0],)](
                *inputs, dropout_seed, alibi_slopes, result, *input_strides, *result.stride(), *statistics,
                sequences, heads, shape[1], heads // kv_heads, rows, keys, head_dim, *scales, **features,
                ALL_BATCHES=shape[0] == 1, ALL_HEADS=shape[1] == 1, SUM_ROWS=sum_rows, SUM_KEYS=sum_keys,
                TILE_M=tile.tile_m, TILE_N=tile.tile_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
                enable_fp_fusion=True, **limit,
            )  # fmt: skip
            if sum_rows or sum_keys:
                summed = [dim for dim, broadcast in ((2, sum_rows), (3, sum_keys)) if broadcast]
                dbias = result.sum(summed).view(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias, dsinks
