"""What the attention kernels in Triton share: where a sequence lies and how its tiles are loaded, a tile of
logits, exponentials and products, and which keys a tile of rows sees.

Everything is in base 2, the GPU's exponential: ``scale``, ``softcap`` and the slopes arrive multiplied by
log2(e). A tile may lie either way, rows or keys first: positions are blocks that broadcast against it.

EXACT, of float32 inputs, is as accurate as PyTorch, which the fast ways are not there: logits stay in base e
(:func:`power`), and long products are summed in parts (``product_triton``). Inputs of 16 bits round by far
more than either saves.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import Target, next_power_of_2
from ..product_triton import add_product

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
def in_base(logits, EXACT: tl.constexpr):
    """Natural logits in the base of the kernels: 2, or e where EXACT."""
    if EXACT:
        return logits
    else:
        return logits * 1.4426950408889634


@triton.jit
def power(logits, EXACT: tl.constexpr):
    """Exponential of float32 logits in the base of the kernels, at most about 0.

    EXACT: the GPU's exponential is of base 2 and takes one float32. The rounding of log2(e) * logits, up to
    half a unit in the last place of a number of ten or so, becomes a relative error of some 3e-7, more than
    all the rest of a softmax has. It is a factor of e^rounding: one of 1 + rounding takes it back.
    """
    if EXACT:
        # Below, the result is 0; and -inf - (-inf) would make NaN of it. NaN itself stays.
        logits = tl.where(logits < -128.0, -128.0, logits)
        in_base_2 = logits * 1.4426950408889634
        result = tl.exp2(in_base_2)
        # logits - ln(2) * in_base_2, with ln(2) as a float32 and what that lacks. The first must be fused.
        rounding = tl.fma(in_base_2, -0.693147182464599609375, logits) + in_base_2 * 1.904654299958e-9
        return result + result * rounding
    else:
        return tl.exp2(logits)


@triton.jit
def divide(x, y, EXACT: tl.constexpr):
    """``x / y``; EXACT: rounded as IEEE says, where ``/`` on NVIDIA may be two units off."""
    if EXACT:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def long_product(
    a_rows, b_rows, in_a, in_b, head_dim,
    TILE_A: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``a b^T`` of two float32 tiles in memory, CHUNK of their columns at a time.

    On NVIDIA each thread holds whole rows of both operands: a large head_dim would spill. And each chunk has
    a sum of its own, see ``product_triton``.
    """
    local_dims = tl.arange(0, CHUNK)
    product = tl.zeros((TILE_A, TILE_B), dtype=tl.float32)
    for start in range(0, TILE_D, CHUNK):
        start = tl.multiple_of(start, CHUNK)
        in_dims = (start + local_dims) < head_dim
        a = load_tile(a_rows[:, None] + (start + local_dims)[None, :], in_a, in_dims, True, False)
        b = load_tile(b_rows[:, None] + (start + local_dims)[None, :], in_b, in_dims, True, False)
        product = add_product(product, a, tl.trans(b), True)
    return product


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh of float32 from one exponential; below 0.6, where that has few digits left, by a polynomial."""
    square = x * x
    # (tanh(x) / x - 1) / x^2 in x^2: least largest relative error of tanh in [0, 0.6], 3e-9.
    series = -0.05378382 + square * (0.020795923 + square * -0.005895098)
    series = x + x * square * (-0.333332986 + square * (0.133319244 + square * series))
    exponential = power(-2.0 * tl.abs(x), True) if EXACT else tl.exp(-2.0 * tl.abs(x))
    # Not (1 - e) / (1 + e), whose numerator has the error of e, and of a rounding, in full.
    far = 1.0 - divide(2.0 * exponential, 1.0 + exponential, EXACT)
    return tl.where(square < 0.36, series, tl.where(x < 0.0, -far, far))


@triton.jit
def logits_of(
    products, row, key, keys, offset, bias, shown, slope, scale, softcap, window_left, window_right,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, SCALED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of ``query . key``, -inf where the key is not visible, and tanh of the capped ones.

    ``row`` and ``key`` are positions in the sequence. MASKED: the tile crosses the window's edge or the end
    of the keys. With HAS_SOFTCAP ``scale`` is softmax_scale / softcap, which has no base; without it the
    second result means nothing. SCALED false leaves the multiplication by ``scale`` to the caller.
    """
    bounded = products
    if HAS_SOFTCAP:
        bounded = tanh(products * scale, EXACT)
        logits = softcap * bounded
    elif SCALED:
        logits = products * scale
    else:
        logits = products
    if HAS_BIAS:
        logits += in_base(bias.to(tl.float32), EXACT)
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
    return max(16, next_power_of_2(head_dim))


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


def scale_arguments(softmax_scale: float, softcap: float, exact: bool) -> tuple[float, float]:
    """``scale`` and ``softcap`` of :func:`logits_of`."""
    unit = 1.0 if exact else LOG2_E
    return (softmax_scale / softcap if softcap > 0 else softmax_scale * unit), softcap * unit


def product_chunk(tile_d: int, exact: bool) -> int:
    """Columns of a tile that the forward's products over head_dim take at a time.

    A chain of 64 float32 fused multiply-adds is still as accurate as cuBLAS.
    """
    return min(tile_d, 64) if exact else tile_d


def register_limit(exact: bool, target: Target) -> dict[str, int]:
    """Compiler options of the forward and backward kernels.

    Float32 products need many registers. With no limit set, NVIDIA's assembler spills a few bytes of some
    cases in order to fit two programs on a processor. ``triton_build`` tells.
    """
    return {"maxnreg": 255} if exact and target.warp == 32 else {}


def strides_of(tensor: Tensor | None, count: int) -> tuple[Any, ...]:
    """The strides of an optional tensor: zeros when it is absent."""
    return (0,) * count if tensor is None else tensor.stride()
