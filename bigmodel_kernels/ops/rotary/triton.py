"""Rotary position embedding in Triton: one launch turns the pairs of queries and keys.

    Su et al.: RoFormer, arXiv 2104.09864.

A program owns some positions of one sequence and a few heads. It loads the angles' cosines and sines once and
goes through its heads::

    halves        a: elements 0 .. R/2        b: elements R/2 .. R         each a contiguous load
    interleaved   one contiguous load of R, which is then split into even (a) and odd (b) elements

    (a, b) -> (a cos - b sin, b cos + a sin), in float32, rounded once;  elements R .. D are copied

The gradient is the same turn with the sines negated.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import cdiv, next_power_of_2, on_device, target_of, unsupported


@triton.jit
def _turn_heads(
    x_ptr, out_ptr, stride_xh, stride_xm, stride_oh, stride_om, cos, sin, first_head, last_head,
    position, in_rows, pairs, head_dim,
    INTERLEAVED: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_REST: tl.constexpr,
):  # fmt: skip
    """Turn heads ``first_head`` to ``last_head`` of one tensor, whose pointers are at the sequence."""
    pair = tl.arange(0, TILE_R)[None, :]
    position = position.to(tl.int64)[:, None]
    rows = in_rows[:, None]
    for head in range(first_head, last_head):
        head_64 = tl.cast(head, tl.int64)
        x_row = x_ptr + head_64 * stride_xh + position * stride_xm
        out_row = out_ptr + head_64 * stride_oh + position * stride_om
        if INTERLEAVED:
            column = tl.arange(0, 2 * TILE_R)[None, :]
            mask = rows & (column < 2 * pairs)
            both = tl.load(x_row + column, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(both, (TILE_M, TILE_R, 2)))
            turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (TILE_M, 2 * TILE_R))
            tl.store(out_row + column, turned.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            mask = rows & (pair < pairs)
            a = tl.load(x_row + pair, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x_row + pairs + pair, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_row + pair, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_row + pairs + pair, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)
        if TILE_REST > 0:
            column = 2 * pairs + tl.arange(0, TILE_REST)[None, :]
            mask = rows & (column < head_dim)
            tl.store(out_row + column, tl.load(x_row + column, mask=mask), mask=mask)


@triton.jit
def rotary_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_cb, stride_cm,
    stride_qob, stride_qoh, stride_qom, stride_kob, stride_koh, stride_kom,
    heads, kv_heads, heads_each, positions, pairs, head_dim,
    INTERLEAVED: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(positions, TILE_M)
    parts = tl.cdiv(heads + kv_heads, heads_each)
    first_head = program % parts * heads_each  # of queries and keys counted together
    position = program // parts % tiles * TILE_M + tl.arange(0, TILE_M)
    batch = (program // (parts * tiles)).to(tl.int64)
    in_rows = position < positions
    pair = tl.arange(0, TILE_R)
    angle = batch * stride_cb + position.to(tl.int64)[:, None] * stride_cm + pair[None, :]
    mask = in_rows[:, None] & (pair < pairs)[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    last_head = tl.minimum(first_head + heads_each, heads + kv_heads)
    _turn_heads(
        query_ptr + batch * stride_qb, query_out_ptr + batch * stride_qob, stride_qh, stride_qm, stride_qoh,
        stride_qom, cos, sin, first_head, tl.minimum(last_head, heads), position, in_rows, pairs, head_dim,
        INTERLEAVED, TILE_M, TILE_R, TILE_REST,
    )  # fmt: skip
    _turn_heads(
        key_ptr + batch * stride_kb, key_out_ptr + batch * stride_kob, stride_kh, stride_km, stride_koh,
        stride_kom, cos, sin, tl.maximum(first_head - heads, 0), last_head - heads, position, in_rows, pairs,
        head_dim, INTERLEAVED, TILE_M, TILE_R, TILE_REST,
    )  # fmt: skip


def run(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Both turned, laid out as (B, S, H, D); see ``bigmodel_kernels.rotary``."""
    batches, heads, positions, head_dim = query.shape
    kv_heads, pairs = key.shape[1], cos.shape[-1]
    query_out, key_out = (
        t.new_empty((batches, positions, t.shape[1], head_dim)).transpose(1, 2) for t in (query, key)
    )
    if query.numel() + key.numel() == 0:
        return query_out, key_out
    tile_r = next_power_of_2(pairs)
    rest = head_dim - 2 * pairs
    tile_m = min(max(1, 1024 // tile_r), next_power_of_2(positions))
    tiles = cdiv(positions, tile_m) * batches
    # Several heads share a load of the angles, as long as every processor has a few programs.
    heads_each = max(1, min(8, (heads + kv_heads) * tiles // (4 * target_of(query).processors)))
    angle_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    with on_device(query):
        rotary_kernel[(cdiv(heads + kv_heads, heads_each) * tiles,)](
            query, key, cos, sin, query_out, key_out, *query.stride()[:3], *key.stride()[:3], *angle_strides,
            *query_out.stride()[:3], *key_out.stride()[:3],
            heads, kv_heads, heads_each, positions, pairs, head_dim,
            INTERLEAVED=interleaved, TILE_M=tile_m, TILE_R=tile_r,
            TILE_REST=next_power_of_2(rest) if rest else 0, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return query_out, key_out


def supports(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> str | None:
    """Why this call cannot run here, or None."""
    if reason := unsupported("query", query):
        return reason
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of {name} has stride {tensor.stride(-1)}; it must be contiguous"
    if cos.stride() != sin.stride():
        return f"sin has strides {sin.stride()}; they must be those of cos, {cos.stride()}"
    return None
