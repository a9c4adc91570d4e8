r"""Attention forward in Triton: ``softmax(scale * Q K^T + bias, masked) V`` with no tensor of Sq x Sk logits.

    Milakov, Gimelshein: Online normalizer calculation for softmax, arXiv 1805.02867.
    Dao: FlashAttention-2, arXiv 2307.08691.

A program owns one tile of TILE_M query rows of one head and walks over the keys that those rows can see::

                 keys ->
              +-------+-------+-------+-------+-------+
              |       | /m    |  m \  |       |       |    skipped: tiles that no row of ours can see (causal,
     queries  |  skip |/ mask | full \| mask  |  skip |    window): they are never loaded
       ours:  |       |  mask | full  |\ mask |       |    mask:    tiles at the edge of the window or of the
              +-------+-------+-------+-------+-------+             sequence, compared key by key
                        left    middle   right             full:    every row sees every key: no comparison

For each tile of keys, with m the running maximum of a row's logits, l the running sum and O the running
output:

    S = scale * Q K_tile^T                    logits, float32
    m' = max(m, rowmax S),  P = 2^(S - m')    base 2: the GPU's exponential; log2(e) is folded into scale
    l = l * 2^(m - m') + rowsum P
    O = O * 2^(m - m') + P V_tile             P in the dtype of V, the sum in float32

and at the end ``out = O / l`` and ``logsumexp = ln 2 * (m + log2 l)``. In float32 (EXACT, see
``triton_logits``) the base is e. A row with no visible key has
l = 0: its output is 0 and its logsumexp is -inf.

Dense (B, H, S, D) and packed (total, H, D) inputs are one kernel: a packed sequence is a dense one that
starts at its ``cu_seqlens`` entry. Every tensor is addressed by its strides, so a slice of a fused QKV
projection needs no copy. Causal masks are aligned to the bottom right: query i sees keys up to
``i + Sk - Sq``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import Target, cdiv, next_power_of_2, on_device, target_of, unsupported
from ..philox import threshold
from ..philox_triton import keep_attention
from ..product_triton import add_product
from .triton_backward import run_backward as run_backward
from .triton_decode import run_decode as run_decode
from .triton_logits import (
    MAX_HEAD_DIM,
    divide,
    in_base,
    keys_seen,
    load_tile,
    logits_of,
    long_product,
    power,
    product_chunk,
    register_limit,
    scale_arguments,
    sequence_of,
    strides_of,
    tile_width,
    window_arguments,
)


@triton.jit
def _attend(
    output, total, maximum, query, q_rows, in_rows,
    key_ptr, value_ptr, padding_ptr, bias_ptr,
    stride_kn, stride_vn, stride_pn, stride_bn,
    rows, dims, begin, end, keys, offset, head_dim,
    slope, scale, softcap, window_left, window_right,
    seed, least, first_row, head, sequence,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SCALE_LATE: tl.constexpr, EXACT: tl.constexpr, EVEN_D: tl.constexpr, CHUNK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """The loop of the module's docstring over the tiles of keys from ``begin`` to ``end``."""
    columns = tl.arange(0, TILE_N)
    for start in range(begin, end, TILE_N):
        start_n = tl.cast(start, tl.int64)  # start * stride may pass 2^31
        key_column = start + columns
        in_range = key_column < keys

        k_tile = key_ptr + start_n * stride_kn + columns[None, :] * stride_kn + dims[:, None]
        if CHUNK < TILE_D:
            k = 0
        elif MASKED and not EVEN_D:
            k = tl.load(k_tile, mask=in_range[None, :] & (dims < head_dim)[:, None], other=0.0)
        elif MASKED:
            k = tl.load(k_tile, mask=in_range[None, :], other=0.0)
        elif not EVEN_D:
            k = tl.load(k_tile, mask=(dims < head_dim)[:, None], other=0.0)
        else:
            k = tl.load(k_tile)
        bias = 0.0
        if HAS_BIAS:
            b_tile = bias_ptr + start_n * stride_bn + columns[None, :] * stride_bn
            if MASKED:  # noqa: SIM108, a branch at compile time
                bias = tl.load(b_tile, mask=in_range[None, :], other=0.0)
            else:
                bias = tl.load(b_tile)
        shown = in_range[None, :]
        if HAS_PADDING:
            padding_tile = padding_ptr + start_n * stride_pn + columns * stride_pn
            shown = (tl.load(padding_tile, mask=in_range, other=0) != 0)[None, :]
        if CHUNK < TILE_D:
            k_rows = key_ptr + start_n * stride_kn + columns * stride_kn
            products = long_product(
                q_rows, k_rows, in_rows, in_range, head_dim, TILE_M, TILE_N, TILE_D, CHUNK
            )
        else:
            products = tl.dot(query, k, input_precision="ieee")
        logits, _ = logits_of(
            products, rows[:, None], key_column[None, :], keys, offset, bias, shown,
            slope, scale, softcap, window_left, window_right,
            MASKED, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_SOFTCAP, HAS_ALIBI, not SCALE_LATE, EXACT,
        )  # fmt: skip

        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        if MASKED or HAS_PADDING or HAS_BIAS:
            # A row that has seen nothing yet has maximum -inf: subtract 0 instead, so that 2^(-inf) = 0, not
            # NaN.
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        else:
            shift = new_maximum
        # SCALE_LATE: the logits are not scaled yet. Scaling their distance from the maximum keeps the weight
        # of the largest exactly 1, where a fused multiply-add of both would leave the rounding error of a
        # large product.
        # And `power` is called for float32 alone: with another inlined function in the table of lines, the
        # assembler gives the same 16-bit code other registers.
        distance = logits - shift[:, None]
        if SCALE_LATE:
            distance *= scale
        weights = power(distance, True) if EXACT else tl.exp2(distance)
        step = maximum - shift
        if SCALE_LATE:
            step *= scale
        correction = power(step, True) if EXACT else tl.exp2(step)
        total = total * correction + tl.sum(weights, axis=1)  # of all weights, dropped or not
        output = output * correction[:, None]
        if HAS_DROPOUT:
            kept = keep_attention(seed, least, first_row, start, head, sequence, TILE_M, TILE_N, False)
            weights = tl.where(kept, weights, 0.0)

        v_tile = value_ptr + start_n * stride_vn + columns[:, None] * stride_vn + dims[None, :]
        v = load_tile(v_tile, in_range, dims < head_dim, MASKED, EVEN_D)
        output = add_product(output, weights.to(v.dtype), v, EXACT)
        maximum = new_maximum
    return output, total, maximum


@triton.jit
def attention_kernel(
    query_ptr, key_ptr, value_ptr, padding_ptr, bias_ptr, cu_q_ptr, cu_k_ptr, seed_ptr, alibi_ptr, sinks_ptr,
    out_ptr, logsumexp_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_pb, stride_pn, stride_bb, stride_bh, stride_bm, stride_bn, stride_ab, stride_ah, stride_sh,
    stride_ob, stride_oh, stride_om, stride_lb, stride_lh,
    heads, group, rows_total, keys_total, head_dim,
    scale, softcap, window_left, window_right, least, keep_scale,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, SCALE_LATE: tl.constexpr, EXACT: tl.constexpr, EVEN_D: tl.constexpr,
    CHUNK: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    # Which rows of which head. The tiles of one head come one after the other and share its keys in the L2
    # cache; under a causal mask the last rows see the most keys, so they start first.
    program = tl.program_id(0)
    tiles = tl.cdiv(rows_total, TILE_M)
    tile = program % tiles
    if HAS_RIGHT:
        tile = tiles - 1 - tile
    head = (program // tiles) % heads
    sequence = program // (tiles * heads)
    first_row = tile * TILE_M

    # Where the sequence lies. Offsets in 64 bits: a tensor may have more than 2^31 elements.
    batch = sequence.to(tl.int64)
    first_q, first_k, queries, keys = sequence_of(
        cu_q_ptr, cu_k_ptr, sequence, rows_total, keys_total, VARLEN
    )
    if first_row >= queries:
        return
    query_ptr += batch * stride_qb + first_q * stride_qm
    out_ptr += batch * stride_ob + first_q * stride_om
    logsumexp_ptr += batch * stride_lb + first_q
    key_ptr += batch * stride_kb + first_k * stride_kn
    value_ptr += batch * stride_vb + first_k * stride_vn
    head_64 = head.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    row_64 = first_row.to(tl.int64)
    key_ptr += kv_head * stride_kh
    value_ptr += kv_head * stride_vh

    local_rows = tl.arange(0, TILE_M)
    rows = first_row + local_rows
    dims = tl.arange(0, TILE_D)
    row_mask = rows < queries
    mask = row_mask[:, None]
    if not EVEN_D:
        mask = mask & (dims < head_dim)[None, :]
    query_tile = (
        query_ptr + head_64 * stride_qh + row_64 * stride_qm + local_rows[:, None] * stride_qm + dims[None, :]
    )
    q_rows = query_ptr + head_64 * stride_qh + row_64 * stride_qm + local_rows * stride_qm
    query = 0
    if CHUNK == TILE_D:
        query = tl.load(query_tile, mask=mask, other=0.0)
    if HAS_PADDING:
        padding_ptr += batch * stride_pb
    if HAS_BIAS:
        # Rows past the end read the bias of the last row: what they compute is not stored.
        bias_row = tl.minimum(rows, queries - 1).to(tl.int64)
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
    output = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    maximum = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    if HAS_LEFT:  # left edge of the window
        output, total, maximum = _attend(
            output, total, maximum, query, q_rows, row_mask, key_ptr, value_ptr, padding_ptr, bias_ptr,
            stride_kn, stride_vn, stride_pn, stride_bn, rows, dims, low, tl.minimum(full_low, high), keys,
            offset, head_dim, slope, scale, softcap, window_left, window_right,
            seed, least, first_row, head, sequence,
            True, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_DROPOUT,
            SCALE_LATE, EXACT, EVEN_D, CHUNK, TILE_M, TILE_N, TILE_D,
        )  # fmt: skip
    output, total, maximum = _attend(  # whole tiles that every row sees
        output, total, maximum, query, q_rows, row_mask, key_ptr, value_ptr, padding_ptr, bias_ptr,
        stride_kn, stride_vn, stride_pn, stride_bn, rows, dims, full_low, full_high, keys,
        offset, head_dim, slope, scale, softcap, window_left, window_right,
        seed, least, first_row, head, sequence,
        False, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_DROPOUT,
        SCALE_LATE, EXACT, EVEN_D, CHUNK, TILE_M, TILE_N, TILE_D,
    )  # fmt: skip
    output, total, maximum = _attend(  # right edge of the window, or of the sequence
        output, total, maximum, query, q_rows, row_mask, key_ptr, value_ptr, padding_ptr, bias_ptr,
        stride_kn, stride_vn, stride_pn, stride_bn, rows, dims, full_high, high, keys,
        offset, head_dim, slope, scale, softcap, window_left, window_right,
        seed, least, first_row, head, sequence,
        True, HAS_LEFT, HAS_RIGHT, HAS_PADDING, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_DROPOUT,
        SCALE_LATE, EXACT, EVEN_D, CHUNK, TILE_M, TILE_N, TILE_D,
    )  # fmt: skip

    if SCALE_LATE:
        maximum = maximum * scale
    if HAS_SINKS:  # one more logit, without a value
        sink = in_base(tl.load(sinks_ptr + head_64 * stride_sh).to(tl.float32), EXACT)
        new_maximum = tl.maximum(maximum, sink)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        correction = power(maximum - shift, EXACT)
        total = total * correction + power(sink - shift, EXACT)
        output = output * correction[:, None]
        maximum = new_maximum
    nothing_seen = total == 0.0
    safe_total = tl.where(nothing_seen, 1.0, total)
    output = divide(output, safe_total[:, None], EXACT)
    if HAS_DROPOUT:
        output = output * keep_scale
    if EXACT:
        logsumexp = tl.where(nothing_seen, float("-inf"), maximum + 0.6931471805599453 * tl.log2(safe_total))
    else:
        logsumexp = tl.where(
            nothing_seen, float("-inf"), 0.6931471805599453 * (maximum + tl.log2(safe_total))
        )
    tl.store(logsumexp_ptr + head_64 * stride_lh + rows, logsumexp, mask=row_mask)
    out_tile = (
        out_ptr + head_64 * stride_oh + row_64 * stride_om + local_rows[:, None] * stride_om + dims[None, :]
    )
    tl.store(out_tile, output.to(out_ptr.dtype.element_ty), mask=mask)


class AttentionTile(NamedTuple):
    """Query rows and keys of a step, and how a program executes it."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


def attention_tile(rows: int, head_dim: int, itemsize: int, target: Target, heavy: bool) -> AttentionTile:
    """The tile for ``rows`` query rows per head; ``heavy``: logits go through more than a scale and a mask.

    A thread holds ``tile_m * (tile_d + 1.5 * tile_n) / threads`` registers of output, logits and weights,
    which has to stay near 160 of its 255 (less where a dropout generator or a softcap needs some); the stages
    of K and V, ``num_stages * 2 * tile_n * tile_d * itemsize`` bytes, have to fit in shared memory beside Q.
    Within both, more query rows mean fewer passes over K and V. ``python -m bigmodel_kernels.triton_build``
    shows that none spills.
    """
    tile_d = tile_width(head_dim)
    if itemsize == 4:
        # Full-precision float32 products hold whole operands in registers: small tiles.
        tile = AttentionTile(
            64 if tile_d <= 64 else 32, 32 if tile_d <= 128 else 16, 8, 1 if tile_d == 128 else 2
        )
    elif tile_d <= 64:
        tile = AttentionTile(128, 64, 8 if heavy or target.warpgroups else 4, 3)
    elif tile_d == 128:
        tile = (
            AttentionTile(64, 64, 4, 3) if heavy and not target.warpgroups else AttentionTile(128, 64, 8, 3)
        )
    elif target.warpgroups:
        tile = AttentionTile(64, 64, 8, 2) if heavy else AttentionTile(128, 32, 8, 2)
    else:
        tile = AttentionTile(64, 32, 8, 2)
    tile_m, tile_n, num_warps, num_stages = tile
    if rows < tile_m:  # short sequences and decoding
        tile_m = max(16, next_power_of_2(max(rows, 1)))
        num_warps = max(1, min(num_warps, tile_m // 16, 4))
        if tile_d >= 128:
            num_warps = max(num_warps, tile_d // 64)
    query_bytes = tile_m * tile_d * itemsize
    stage_bytes = 2 * tile_n * tile_d * itemsize
    while num_stages > 1 and query_bytes + num_stages * stage_bytes > target.shared_memory:
        num_stages -= 1
    if query_bytes + num_stages * stage_bytes > target.shared_memory:
        tile_n //= 2
    return AttentionTile(tile_m, tile_n, num_warps, num_stages)


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
    """Output and natural-log logsumexp, with the layouts that ``bigmodel_kernels.attention`` documents."""
    varlen = cu_seqlens_q is not None and cu_seqlens_k is not None
    head_dim = query.shape[-1]
    if varlen:
        assert cu_seqlens_q is not None and cu_seqlens_k is not None
        total, heads, _ = query.shape
        sequences, rows, keys, kv_heads = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k, key.shape[1]
        out = torch.empty((total, heads, head_dim), dtype=query.dtype, device=query.device)
        logsumexp = torch.empty((heads, total), dtype=torch.float32, device=query.device)
        # A packed tensor is a dense one of stride 0 over the sequences.
        strides = [(0, t.stride(1), t.stride(0)) for t in (query, key, value, out)]
        logsumexp_strides = (0, total)
    else:
        sequences, heads, rows, _ = query.shape
        kv_heads, keys = key.shape[1], key.shape[2]
        out = torch.empty(
            (sequences, rows, heads, head_dim), dtype=query.dtype, device=query.device
        ).transpose(1, 2)
        logsumexp = torch.empty((sequences, heads, rows), dtype=torch.float32, device=query.device)
        strides = [(t.stride(0), t.stride(1), t.stride(2)) for t in (query, key, value, out)]
        logsumexp_strides = (heads * rows, rows)
    if out.numel() == 0 or rows == 0:
        return out, logsumexp

    if bias is not None:
        bias = bias.expand(sequences, heads, rows, keys)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(sequences, heads)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(torch.uint8)
    has_left, has_right, left, right = window_arguments(is_causal, window_left, window_right, rows, keys)
    extra = bias is not None or alibi_slopes is not None or softcap > 0
    target = target_of(query)
    tile = attention_tile(rows, head_dim, query.element_size(), target, extra or dropout_seed is not None)
    tile_d = tile_width(head_dim)
    exact = query.dtype == torch.float32
    strides_q, strides_k, strides_v, strides_o = strides
    with on_device(query):
        attention_kernel[(cdiv(rows, tile.tile_m) * heads * sequences,)](
            query, key, value, key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed,
            alibi_slopes, sinks, out, logsumexp,
            *strides_q, *strides_k, *strides_v, *strides_of(key_padding_mask, 2), *strides_of(bias, 4),
            *strides_of(alibi_slopes, 2), *strides_of(sinks, 1), *strides_o, *logsumexp_strides,
            heads, heads // kv_heads, rows, keys, head_dim, *scale_arguments(softmax_scale, softcap, exact),
            left, right, threshold(dropout_p), 1.0 / (1.0 - dropout_p),
            VARLEN=varlen, HAS_LEFT=has_left, HAS_RIGHT=has_right, HAS_PADDING=key_padding_mask is not None,
            HAS_BIAS=bias is not None, HAS_ALIBI=alibi_slopes is not None, HAS_SINKS=sinks is not None,
            HAS_SOFTCAP=softcap > 0, HAS_DROPOUT=dropout_seed is not None,
            SCALE_LATE=not extra and softmax_scale > 0, EXACT=exact,
            EVEN_D=tile_d == head_dim, CHUNK=product_chunk(tile_d, exact),
            TILE_M=tile.tile_m, TILE_N=tile.tile_n, TILE_D=tile_d,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            **register_limit(exact, target),
        )  # fmt: skip
    return out, logsumexp


def supports(
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
) -> str | None:
    """Why this call cannot run here, or None."""
    return _supports(query, key=key, value=value)


def _supports(query: Tensor, **others: Tensor) -> str | None:
    if reason := unsupported("query", query):
        return reason
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim is {query.shape[-1]}; the Triton kernel takes up to {MAX_HEAD_DIM}"
    return _laid_out(query=query, **others)


def _laid_out(**tensors: Tensor) -> str | None:
    """Why the kernels cannot address one of these, or None."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of {name} has stride {tensor.stride(-1)}; it must be contiguous"
        distance = tensor.stride(0 if tensor.dim() == 3 else 2)
        if distance >= 2**23:  # offsets within a tile are 32-bit, those of a tile 64-bit
            return f"the rows of {name} are {distance} elements apart; the Triton kernel takes < 2^23"
    return None


def supports_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *rest: Any,
    bias_requires_grad: bool = False,
    sinks_require_grad: bool = False,
    deterministic: bool = False,
    side_by_side: bool = False,
    **options: Any,
) -> str | None:
    """Why this call of :func:`run_backward` cannot run here, or None."""
    return supports(query, key, value, *rest, **options) or _laid_out(grad_out=grad_out, out=out)


def supports_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any, **options: Any
) -> str | None:
    """Why this call of :func:`run_decode` cannot run here, or None."""
    return _supports(query, key_cache=key_cache, value_cache=value_cache)
