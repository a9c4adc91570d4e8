"""What the attention kernels in Triton share: where a sequence lies and how its tiles are loaded, a tile of
logits, and which keys a tile of rows sees.

Everything is in base 2, the GPU's exponential: ``scale``, ``softcap`` and the slopes arrive multiplied by
log2(e). A tile may lie either way, rows or keys first: positions are blocks that broadcast against it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256


@triton.jit
def sequence_of(
    cu_q_ptr, cu_k_ptr, sequence, rows_total, keys_total, VARLEN: tl.constexpr
):  # fmt: skip
    """Rows and keys of a sequence, and where they begin in packed tensors."""
    first_q = tl.cast(0, tl.int64)
    first_k = tl.cast(0, tl.int64)
    queries = rows_total
    keys = keys_total
    if VARLEN:
        first_q = tl.load(cu_q_ptr + sequence).to(tl.int64)
        first_k = tl.load(cu_k_ptr + sequence).to(tl.int64)
        queries = (tl.load(cu_q_ptr + sequence + 1) - first_q).to(tl.int32)
        keys = (tl.load(cu_k_ptr + sequence + 1) - first_k).to(tl.int32)
    return first_q, first_k, queries, keys


@triton.jit
def load_tile(tile, in_range, in_dims, MASKED: tl.constexpr, EVEN_D: tl.constexpr):
    """A tile of rows or keys x dims, zero outside."""
    if MASKED and not EVEN_D:
        return tl.load(tile, mask=in_range[:, None] & in_dims[None, :], other=0.0)
    elif MASKED:
        return tl.load(tile, mask=in_range[:, None], other=0.0)
    elif not EVEN_D:
        return tl.load(tile, mask=in_dims[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def tanh(x):
    """tanh of float32 from one exponential; near 0, where that has no digits left, by its series."""
    square = x * x
    series = x * (
        1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.05396825 + square * 0.02186949)))
    )
    exponential = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - exponential) / (1.0 + exponential)
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -far, far))


@triton.jit
def logits_of(
    products, row, key, keys, offset, bias, shown, slope, scale, softcap, window_left, window_right,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of ``query . key``, -inf where the key is not visible, and tanh of the capped ones.

    ``row`` and ``key`` are positions in the sequence. MASKED: the tile crosses the window's edge or the end
    of the keys. With HAS_SOFTCAP ``scale`` is softmax_scale / softcap, which has no base; without it the
    second result means nothing. SCALED false leaves the multiplication by ``scale`` to the caller.
    """
    bounded = products
    if HAS_SOFTCAP:
        bounded = tanh(products * scale)
        logits = softcap * bounded
    elif SCALED:
        logits = products * scale
    else:
        logits = products
    if HAS_BIAS:
        logits += bias.to(tl.float32) * 1.4426950408889634
    if HAS_ALIBI:
        logits -= slope * tl.abs((row + offset - key).to(tl.float32))
    if MASKED:
        visible = key < keys
        if HAS_RIGHT:
            visible = visible & (key <= row + (offset + window_right))
        if HAS_LEFT:
            visible = visible & (key >= row + (offset - window_left))
        logits = tl.where(visible, logits, float("-inf"))
    if HAS_PADDING:
        logits = tl.where(shown, logits, float("-inf"))
    return logits, bounded


@triton.jit
def keys_seen(
    first_row, last_row, keys, offset, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Keys that some of the rows see, [low, high), and that all of them see, [full_low, full_high).

    All but ``high`` are multiples of TILE_N.
    """
    low = 0
    high = keys
    full_low = 0
    full_high = keys
    if HAS_RIGHT:
        high = tl.maximum(0, tl.minimum(keys, last_row + offset + window_right + 1))
        full_high = tl.maximum(0, tl.minimum(keys, first_row + offset + window_right + 1))
    if HAS_LEFT:
        low = tl.maximum(0, first_row + offset - window_left) // TILE_N * TILE_N
        full_low = tl.cdiv(tl.maximum(0, last_row + offset - window_left), TILE_N) * TILE_N
    full_high = tl.maximum(full_high // TILE_N * TILE_N, full_low)
    return low, full_low, full_high, high


@triton.jit
def rows_seeing(
    first_key, last_key, queries, offset, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Rows that see some of the keys, [low, high), and that see all of them, [full_low, full_high).

    All but ``high`` are multiples of TILE_M.
    """
    low = 0
    high = queries
    full_low = 0
    full_high = queries
    if HAS_RIGHT:  # key <= row + offset + window_right
        low = tl.maximum(0, first_key - offset - window_right) // TILE_M * TILE_M
        full_low = tl.cdiv(tl.maximum(0, last_key - offset - window_right), TILE_M) * TILE_M
    if HAS_LEFT:  # key >= row + offset - window_left
        high = tl.maximum(0, tl.minimum(queries, last_key - offset + window_left + 1))
        full_high = tl.maximum(0, tl.minimum(queries, first_key - offset + window_left + 1))
    full_high = tl.maximum(full_high // TILE_M * TILE_M, full_low)
    return low, full_low, full_high, high


def tile_width(head_dim: int) -> int:
    """Columns of a tile that holds ``head_dim``: a power of 2, and enough for a matrix instruction."""
    return max(16, triton.next_power_of_2(head_dim))


def window_arguments(
    is_causal: bool, window_left: int, window_right: int, rows: int, keys: int
) -> tuple[bool, bool, int, int]:
    """Whether there is a limit on the left and on the right, and which (0 where there is none)."""
    if is_causal:
        window_right = 0
    # A limit beyond every key is none; it could overflow the kernels' 32-bit positions.
    has_left = 0 <= window_left < rows + keys
    has_right = 0 <= window_right < rows + keys
    return has_left, has_right, window_left if has_left else 0, window_right if has_right else 0


def scale_arguments(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """``scale`` and ``softcap`` of :func:`logits_of`."""
    return (softmax_scale / softcap if softcap > 0 else softmax_scale * LOG2_E), softcap * LOG2_E


def strides_of(tensor: Tensor | None, count: int) -> tuple[Any, ...]:
    """The strides of an optional tensor: zeros when it is absent."""
    return (0,) * count if tensor is None else tensor.stride()
