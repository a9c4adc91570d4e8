r"""Matrix products in Triton, with what follows them done before the accumulator leaves the registers.

One loop, :func:`_product`, serves every product of a linear layer and a feed-forward block::

                      N                           programs walk the output in columns of GROUP_ROWS tiles, so
                 +----+----+----+                 that those running together share x and W tiles in the L2:
        K        | W  |    |    |
     +------+    +----+----+----+                         1  3 |  5  7
     |  x   | -> | C  |    |    |  M                      2  4 |  6  8     (GROUP_ROWS = 2)
     +------+    +----+----+----+

    C = sum over K tiles of x_tile @ W_tile        float32 accumulator

:func:`linear_kernel`, forward and plain products (x and W are addressed by their strides alone: either layout
of a weight, and the transposed operands of a backward, need no copy):

    C  = scale * C + bias                          stored too where a backward will want it
    C  = dropout(activation(C)) + residual         float32, rounded once, stored
    gated: two weights share the x tile, two accumulators; C = activation(gate) * C

:func:`hidden_backward_kernel`, the first product of a feed-forward block's backward, dH = dY @ W_out^T:

    dZ = dH * activation'(Z)                       gated: dU = dH * act(G), dG = dH * U * act'(G)
    H  = activation(Z)                             written again for the gradient of W_out
    and the column sums of a tile of dZ, which the gradient of the bias is the sum of

Where rows are few and K is long (gradients of weights, K = tokens), K is split over programs that write
float32 parts, which ``ops/reduce_triton.py`` adds up in order: no atomics, the same bits every run.

On Hopper and Blackwell large products run with tensor descriptors (the hardware copies a tile of x or W to
shared memory in one instruction) and as many programs as processors, each walking over several tiles, so that
one tile's epilogue overlaps the next one's loads.

The tile order is that of the Triton matrix multiplication tutorial. Activations: Hendrycks and Gimpel,
Gaussian Error Linear Units, arXiv 1606.08415; gates: Shazeer, GLU Variants Improve Transformer, arXiv
2002.05202.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import triton_tuning
from ...triton_runtime import Target, cdiv, next_power_of_2, on_device, target_of
from ..philox_triton import keep_elements
from ..product_triton import add_product
from ..reduce_triton import sum_parts

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
GROUP_ROWS = 8


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation named ``ACTIVATION`` of float32 ``x``."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 x (1 + tanh u) is x sigmoid(2u): one exponential, and 1 + tanh does not cancel for u < 0.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * u))
    elif ACTIVATION == "quick_gelu":
        x = x / (1.0 + tl.exp(-1.702 * x))
    elif ACTIVATION == "relu":
        # Not a maximum: GPU maxima drop NaN, which has to come through.
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def _sigmoid(x):
    """The logistic function and its derivative; neither overflows, nor does 1 minus the function cancel."""
    small = tl.exp(-tl.abs(x))
    near_one = 1.0 / (1.0 + small)
    return tl.where(x < 0.0, small * near_one, near_one), small * near_one * near_one


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation at float32 ``x``."""
    if ACTIVATION == "gelu":
        # The distribution function and x times the density of the normal distribution.
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        result = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        gate, dgate = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        result = gate + x * dgate * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACTIVATION == "quick_gelu":
        gate, dgate = _sigmoid(1.702 * x)
        result = gate + 1.702 * x * dgate
    elif ACTIVATION == "relu":
        result = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        gate, dgate = _sigmoid(x)
        result = gate + x * dgate
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        result = tl.zeros_like(x) + 1.0
    return result


# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_ROWS: tl.constexpr):
    """Row and column, in tiles, of the tile of this number."""
    group_size = GROUP_ROWS * tiles_n
    first_m = (tile // group_size) * GROUP_ROWS
    rows_in_group = min(tiles_m - first_m, GROUP_ROWS)
    return first_m + (tile % group_size) % rows_in_group, (tile % group_size) // rows_in_group


@triton.jit
def _product(
    x_ptr, w_ptr, gate_ptr, tile_m, tile_n, M, N, k_begin, k_end,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_gk, stride_gn,
    DESCRIPTORS: tl.constexpr, X_TRANSPOSED: tl.constexpr, W_TRANSPOSED: tl.constexpr, GATED: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """x @ W and, if GATED, x @ gate (otherwise zeros that nobody reads), for one tile and part of K."""
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    gate_total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    if DESCRIPTORS:  # of 16-bit operands alone
        # What lies outside a matrix arrives as zeros. TRANSPOSED: the descriptor is that of x^T or W^T, the
        # one whose rows are contiguous.
        row, column = tile_m * TILE_M, tile_n * TILE_N
        for k in range(k_begin, k_end, TILE_K):
            x = x_ptr.load([k, row]).T if X_TRANSPOSED else x_ptr.load([row, k])
            w = w_ptr.load([column, k]).T if W_TRANSPOSED else w_ptr.load([k, column])
            total = tl.dot(x, w, total)
            if GATED:
                gate = gate_ptr.load([column, k]).T if W_TRANSPOSED else gate_ptr.load([k, column])
                gate_total = tl.dot(x, gate, gate_total)
    else:
        EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
        rows = tile_m * TILE_M + tl.arange(0, TILE_M)
        columns = tile_n * TILE_N + tl.arange(0, TILE_N)
        depth = tl.arange(0, TILE_K)
        # Rows and columns past the edge wrap round instead of being masked: they read valid memory, and what
        # they compute is not stored. 64-bit row offsets: a matrix may have more than 2^31 elements.
        x_rows = (rows % M).to(tl.int64)
        w_columns = (columns % N).to(tl.int64)
        deep = (k_begin + depth).to(tl.int64)
        x_tile = x_ptr + x_rows[:, None] * stride_xm + deep[None, :] * stride_xk
        w_tile = w_ptr + deep[:, None] * stride_wk + w_columns[None, :] * stride_wn
        if GATED:
            gate_tile = gate_ptr + deep[:, None] * stride_gk + w_columns[None, :] * stride_gn
        for k in range(k_begin, k_end, TILE_K):
            if EVEN_K:
                x = tl.load(x_tile)
                w = tl.load(w_tile)
            else:
                x = tl.load(x_tile, mask=depth[None, :] < k_end - k, other=0.0)
                w = tl.load(w_tile, mask=depth[:, None] < k_end - k, other=0.0)
            total = add_product(total, x, w, EXACT)
            if GATED:
                if EVEN_K:
                    gate = tl.load(gate_tile)
                else:
                    gate = tl.load(gate_tile, mask=depth[:, None] < k_end - k, other=0.0)
                gate_total = add_product(gate_total, x, gate, EXACT)
                gate_tile += TILE_K * stride_gk
            x_tile += TILE_K * stride_xk
            w_tile += TILE_K * stride_wk
    return total, gate_total


@triton.jit
def _linear_tile(
    tile, tiles_m, tiles_n,
    x_ptr, w_ptr, gate_ptr, bias_ptr, gate_bias_ptr, residual_ptr, seed_ptr, scale_ptr,
    out_ptr, saved_ptr, gate_saved_ptr,
    M, N, K, k_split,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_gk, stride_gn, stride_rm, stride_om, stride_sm,
    first_column, least, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SCALE: tl.constexpr, SAVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_TRANSPOSED: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_ROWS)
    split = tl.program_id(1)
    total, gate = _product(
        x_ptr, w_ptr, gate_ptr, tile_m, tile_n, M, N, split * k_split, min(K, (split + 1) * k_split),
        stride_xm, stride_xk, stride_wk, stride_wn, stride_gk, stride_gn,
        DESCRIPTORS, X_TRANSPOSED, W_TRANSPOSED, GATED, EVEN_K, TILE_M, TILE_N, TILE_K,
    )  # fmt: skip

    rows = tile_m * TILE_M + tl.arange(0, TILE_M)
    columns = tile_n * TILE_N + tl.arange(0, TILE_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    # A 64-bit offset for the tile and 32-bit ones within it, which leave registers to the accumulator.
    first_row = (tile_m * TILE_M).to(tl.int64)
    local_rows = tl.arange(0, TILE_M)[:, None]
    if HAS_SCALE:
        total *= tl.load(scale_ptr)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE_BIAS:
        gate += tl.load(gate_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        place = first_row * stride_sm + (local_rows * stride_sm + columns[None, :])
        tl.store(saved_ptr + place, total.to(saved_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(gate_saved_ptr + place, gate.to(saved_ptr.dtype.element_ty), mask=mask)
    if GATED:
        total *= activate(gate, ACTIVATION)
    else:
        total = activate(total, ACTIVATION)
    if HAS_DROPOUT:
        keep = keep_elements(
            tl.load(seed_ptr), least, rows.to(tl.int64), first_column + tile_n * TILE_N, TILE_N
        )
        total = tl.where(keep, total * keep_scale, 0.0)
    if HAS_RESIDUAL:
        residual = residual_ptr + first_row * stride_rm + (local_rows * stride_rm + columns[None, :])
        total += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    # Parts of a split product lie one after the other.
    out = out_ptr + (split.to(tl.int64) * M + first_row) * stride_om
    out += local_rows * stride_om + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, gate_ptr, bias_ptr, gate_bias_ptr, residual_ptr, seed_ptr, scale_ptr,
    out_ptr, saved_ptr, gate_saved_ptr,
    M, N, K, k_split,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_gk, stride_gn, stride_rm, stride_om, stride_sm,
    first_column, least, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SCALE: tl.constexpr, SAVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_TRANSPOSED: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    # One tile for a program, or (descriptors) every num_programs-th.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        _linear_tile(
            tile, tiles_m, tiles_n,
            x_ptr, w_ptr, gate_ptr, bias_ptr, gate_bias_ptr, residual_ptr, seed_ptr, scale_ptr,
            out_ptr, saved_ptr, gate_saved_ptr,
            M, N, K, k_split,
            stride_xm, stride_xk, stride_wk, stride_wn, stride_gk, stride_gn, stride_rm, stride_om, stride_sm,
            first_column, least, keep_scale,
            ACTIVATION, GATED, HAS_BIAS, HAS_GATE_BIAS, HAS_RESIDUAL, HAS_DROPOUT, HAS_SCALE, SAVE,
            DESCRIPTORS, X_TRANSPOSED, W_TRANSPOSED, EVEN_K, TILE_M, TILE_N, TILE_K, GROUP_ROWS,
        )  # fmt: skip


@triton.jit
def hidden_backward_kernel(
    x_ptr, w_ptr, up_ptr, gate_ptr, dup_ptr, dgate_ptr, hidden_ptr, dup_parts_ptr, dgate_parts_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_um,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, NEED_HIDDEN: tl.constexpr, NEED_SUMS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_TRANSPOSED: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_ROWS)
        dhidden, _gate = _product(
            x_ptr, w_ptr, w_ptr, tile_m, tile_n, M, N, 0, K,
            stride_xm, stride_xk, stride_wk, stride_wn, 0, 0,
            DESCRIPTORS, X_TRANSPOSED, W_TRANSPOSED, False, EVEN_K, TILE_M, TILE_N, TILE_K,
        )  # fmt: skip
        rows = tile_m * TILE_M + tl.arange(0, TILE_M)
        columns = tile_n * TILE_N + tl.arange(0, TILE_N)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        first_row = (tile_m * TILE_M).to(tl.int64)
        # What is saved, its gradients and the hidden layer are all contiguous (M, N).
        place = first_row * stride_um + (tl.arange(0, TILE_M)[:, None] * stride_um + columns[None, :])
        up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dtype = dup_ptr.dtype.element_ty
        part = tile_m.to(tl.int64) * N + columns
        if NEED_SUMS:  # rows past the edge wrapped round, and must not be summed
            dhidden = tl.where(mask, dhidden, 0.0)
        if GATED:
            gate = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
            dgate = dhidden * up * slope(gate, ACTIVATION)
            tl.store(dgate_ptr + place, dgate.to(dtype), mask=mask)
            if NEED_SUMS:
                tl.store(dgate_parts_ptr + part, tl.sum(dgate, axis=0), mask=columns < N)
            gate = activate(gate, ACTIVATION)
            dup = dhidden * gate
            hidden = up * gate
        else:
            dup = dhidden * slope(up, ACTIVATION)
            hidden = activate(up, ACTIVATION)
        tl.store(dup_ptr + place, dup.to(dtype), mask=mask)
        if NEED_SUMS:
            tl.store(dup_parts_ptr + part, tl.sum(dup, axis=0), mask=columns < N)
        if NEED_HIDDEN:
            tl.store(hidden_ptr + place, hidden.to(dtype), mask=mask)


@triton.jit
def output_backward_kernel(
    grad_ptr, saved_ptr, seed_ptr, out_ptr, rows, columns, stride_grad, stride_saved, least, keep_scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of dropout(activation(saved)), element by element: where no product's epilogue has it."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    grad = tl.load(grad_ptr + row[:, None] * stride_grad + column[None, :], mask=mask, other=0.0)
    grad = grad.to(tl.float32)
    if HAS_DROPOUT:
        keep = keep_elements(tl.load(seed_ptr), least, row, tl.program_id(1) * TILE_COLUMNS, TILE_COLUMNS)
        grad = tl.where(keep, grad * keep_scale, 0.0)
    if ACTIVATION != "none":
        saved = tl.load(saved_ptr + row[:, None] * stride_saved + column[None, :], mask=mask, other=0.0)
        grad *= slope(saved.to(tl.float32), ACTIVATION)
    out = out_ptr + row[:, None] * columns + column[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=mask)


# ---- tiles -------------------------------------------------------------------------------------------------


class GemmTile(NamedTuple):
    """Tile of the output, depth of a step of the K loop, and how programs execute it."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Operands through tensor descriptors, one program for each processor."""
    splits: int = 1
    """Parts of K, each a program's own."""


# Tiles that keep their accumulator in registers; larger ones reuse operands more, smaller ones fill a device
# with less work.
HALF_TILES = (
    GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 8, 3), GemmTile(128, 64, 64, 4, 4),
    GemmTile(64, 128, 64, 4, 4), GemmTile(64, 64, 64, 4, 4), GemmTile(32, 64, 64, 4, 5),
    GemmTile(16, 64, 128, 4, 4), GemmTile(16, 32, 128, 2, 4),
)  # fmt: skip
# The products of a step are one chain of float32 roundings, see ``product_triton``: 16 of them are as accurate
# as cuBLAS with room to spare, 32 are not where K is 64.
FLOAT_TILES = (
    GemmTile(64, 64, 16, 4, 5), GemmTile(32, 64, 16, 4, 6), GemmTile(32, 32, 16, 4, 5),
    GemmTile(16, 32, 16, 2, 8),
)  # fmt: skip
MAX_CANDIDATES = 4
MAX_SPLITS = 16


@functools.lru_cache(maxsize=1024)
def gemm_tiles(
    M: int,
    N: int,
    K: int,
    itemsize: int,
    target: Target,
    *,
    products: int = 1,
    heavy: int = 0,
    aligned: bool = True,
    descriptors: bool = False,
    split: bool = False,
) -> tuple[GemmTile, ...]:
    """Up to ``MAX_CANDIDATES`` tiles for an (M, K) by (K, N) product, that with the least modelled time
    first.

    Time is counted in the multiply-adds a processor does meanwhile. A wave is one tile on every processor.
    For each step of K a tile costs its multiplications plus the operands it loads, ``tile_m * tile_n + 48 *
    (tile_m + tile_n)``: 48 is about the ratio of arithmetic to L2 bandwidth, in multiplications per element,
    of the devices the kernels are for. The last, partly filled wave costs a whole one. Splitting K costs a
    write and a read of each float32 part, and a launch.

    ``products``: accumulators (2 for a gate). ``heavy``: 1 if the epilogue needs registers of its own (erf,
    a residual), 2 if those of several tensors at once, 3 of many. ``aligned``: rows start at multiples of 16
    bytes, so that loads are vectors. ``descriptors``: the operands may be copied through tensor descriptors,
    aligned or not. ``split``: K may be split.
    """
    half = itemsize < 4
    # The largest accumulators fill the registers: they need the warpgroups' matrix unit and a light epilogue.
    # float32 has no matrix unit, and its operands are in registers too.
    if heavy == 3 and (not target.warpgroups or target.tensor_memory):
        heavy = 2  # only Hopper's accumulators lack the room
    limit = (128 if target.warpgroups else 64, 64, 32, 16)[heavy] if half else (32, 32, 16, 16)[heavy]
    # In multiply-adds: a byte through memory (at 15 bytes per clock and processor), and a launch (3 us).
    byte, launch = (270.0, 2e7) if half else (8.0, 6e5)
    found: list[tuple[float, GemmTile]] = []
    for tile in HALF_TILES if half else FLOAT_TILES:
        if heavy >= 2:  # a thread's share is smaller with more of them
            warps = min(8, tile.tile_m * tile.tile_n // 1024) * (heavy - 1)
            tile = tile._replace(num_warps=max(tile.num_warps, warps))
        if products * tile.tile_m * tile.tile_n > limit * tile.num_warps * 32 and tile.tile_m > 16:
            continue
        if not aligned and not descriptors:  # every element is a load of its own, with its own address
            tile = tile._replace(
                tile_m=min(tile.tile_m, 64),
                tile_n=min(tile.tile_n, 64),
                tile_k=min(tile.tile_k, 32),
                num_warps=8,
            )
        tile_k = min(tile.tile_k, max(16, next_power_of_2(K)))
        stage = (tile.tile_m + products * tile.tile_n) * tile_k * itemsize
        if stage > target.shared_memory:
            continue
        stages = max(1, min(tile.num_stages, target.shared_memory // stage))
        tile = tile._replace(tile_k=tile_k, num_stages=stages)
        tiles = cdiv(M, tile.tile_m) * cdiv(N, tile.tile_n)
        step = products * tile.tile_m * tile.tile_n + 48 * (tile.tile_m + products * tile.tile_n)
        for splits in _splits(tiles, K, tile_k, target) if split else (1,):
            depth = cdiv(cdiv(K, splits), tile_k) * tile_k
            time: float = cdiv(tiles * splits, target.processors) * step * depth
            if splits > 1:
                time += splits * M * N * 8 * byte / target.processors + launch
            if aligned or not descriptors or tile.tile_m < 64:
                found.append((time, tile._replace(splits=splits)))
            if descriptors and tile.tile_m >= 64 and tile.tile_n >= 64 and tile_k >= 32:
                # A little ahead: addresses cost no registers, and loads run through the epilogue.
                found.append((0.95 * time, tile._replace(splits=splits, descriptors=True)))
    ordered = [tile for _, tile in sorted(found, key=lambda pair: pair[0])]
    return tuple(dict.fromkeys(ordered))[:MAX_CANDIDATES]


def _splits(tiles: int, K: int, tile_k: int, target: Target) -> list[int]:
    """Numbers of parts of K that fill the device no more than once, each part a few steps long."""
    most = min(target.processors // tiles, K // (4 * tile_k), MAX_SPLITS)
    return sorted({1, *(s for s in (2, 3, 4, 6, 8, 12, 16) if s <= most)})


# ---- launches ----------------------------------------------------------------------------------------------


def _is_aligned(matrix: Tensor) -> bool:
    """Whether rows (or, of a transposed matrix, columns) can be read in vectors of 16 bytes."""
    vector = 16 // matrix.element_size()
    return all(
        s % vector == 0 or (s == 1 and size % vector == 0)
        for size, s in zip(matrix.shape, matrix.stride(), strict=True)
    )


def _bucket(rows: int) -> int:
    """The least number not below ``rows`` with three significant bits: tokens are tuned in buckets."""
    step = 1 << max(0, rows.bit_length() - 3)
    return cdiv(rows, step) * step


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can stand for the matrix or for its transpose."""
    if matrix.element_size() > 2 or matrix.data_ptr() % 16 or matrix.numel() == 0:
        return False
    vector = 16 // matrix.element_size()
    outer, inner = matrix.stride()
    return (inner == 1 and outer % vector == 0 and outer > 0) or (
        outer == 1 and inner % vector == 0 and inner > 0
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of tiles of a matrix, and whether it is that of the transpose."""
    transposed = matrix.stride(1) != 1
    if transposed:
        matrix, rows, columns = matrix.t(), columns, rows
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns]), transposed


def _operands(
    x: Tensor, weights: tuple[Tensor | None, ...], tile: GemmTile
) -> tuple[list[Any], dict[str, bool]]:
    """What a kernel gets for x (M, K) and for each of weights (K, N), and the constants that say how."""
    if not tile.descriptors:
        return [x, *weights], {"DESCRIPTORS": False, "X_TRANSPOSED": False, "W_TRANSPOSED": False}
    x_operand, x_transposed = _descriptor(x, tile.tile_m, tile.tile_k)
    pairs = [None if w is None else _descriptor(w, tile.tile_k, tile.tile_n) for w in weights]
    return [x_operand, *(None if pair is None else pair[0] for pair in pairs)], {
        "DESCRIPTORS": True,
        "X_TRANSPOSED": x_transposed,
        "W_TRANSPOSED": pairs[0] is not None and pairs[0][1],
    }


def _programs(tile: GemmTile, M: int, N: int, target: Target) -> int:
    tiles = cdiv(M, tile.tile_m) * cdiv(N, tile.tile_n)
    return min(tiles, max(1, target.processors // tile.splits)) if tile.descriptors else tiles


def _choose(
    kernel: str,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    N: int,
    launch: Callable[[GemmTile], None],
    *,
    heavy: int,
    split: bool = False,
    repeatable: bool = True,
) -> GemmTile:
    """The tile that the tuner has for this product; the cost model's where it has none."""
    M, K = x.shape
    target = target_of(x)
    given = [w for w in weights if w is not None]
    aligned = all(map(_is_aligned, (x, *given)))
    layouts = {w.stride(0) == 1 for w in given}
    descriptors = target.warpgroups and len(layouts) == 1 and all(map(_describable, (x, *given)))
    # Gradients of weights have the number of tokens for K, all else for M.
    rows, depth = (M, _bucket(K)) if split else (_bucket(M), K)
    candidates = gemm_tiles(
        rows, N, depth, x.element_size(), target,
        products=len(given), heavy=heavy, aligned=aligned, descriptors=descriptors, split=split,
    )  # fmt: skip
    flags = [len(given), heavy, aligned, descriptors, split, x.stride(0) == 1, given[0].stride(0) == 1]
    key = f"{kernel} {rows}x{depth}x{N} {x.dtype} {flags}"
    return triton_tuning.choose(key, candidates, launch, x, repeatable=repeatable)


def matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    saved: Tensor | None = None,
    gate_saved: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    dropout: tuple[int, float] = (0, 1.0),
    first_column: int = 0,
    scale: Tensor | None = None,
    split: bool = False,
) -> Tensor:
    """``out[:] = dropout(activation(scale * x @ weight + bias)) + residual`` on matrices of any strides.

    x (M, K), weight (K, N), out, residual, saved and gate_saved (M, N) with contiguous rows, the last two
    with the same; ``saved`` gets what the activation is given. With ``gate`` (K, N) the activation is of ``x
    @ gate + gate_bias``, and multiplies the other product. residual may be out itself. ``dropout``: the least
    Philox word that is kept and what kept elements are multiplied by; ``first_column``, a multiple of 32: the
    number of out's first column in the matrix that is dropped from. ``scale``: a float32 scalar on the
    device. ``split``: K may be split over programs, where nothing follows the product but the scale.
    """
    M, K = x.shape
    N = out.shape[1]
    if M == 0 or N == 0:
        return out
    plain = bias is None and gate is None and activation == "none" and residual is None
    split = split and plain and saved is None and dropout_seed is None and out.is_contiguous()

    def launch(tile: GemmTile) -> None:
        target = target_of(x)
        operands, how = _operands(x, (weight, gate), tile)
        parts = out
        k_split = K
        if tile.splits > 1:
            k_split = cdiv(cdiv(K, tile.splits), tile.tile_k) * tile.tile_k
            parts = torch.empty(cdiv(K, k_split), M, N, dtype=torch.float32, device=x.device)
        # With no limit set, the assembler for Blackwell spills a few bytes of some kernels, in order to fit
        # more programs on a processor.
        limit = {"maxnreg": min(255, 2048 // tile.num_warps)} if target.tensor_memory else {}
        late_scale = scale if parts is not out else None
        with on_device(x):
            linear_kernel[(_programs(tile, M, N, target), cdiv(max(K, 1), max(k_split, 1)))](
                *operands, bias, gate_bias, residual, dropout_seed, None if late_scale is not None else scale,
                parts, saved, gate_saved,
                M, N, K, k_split,
                *x.stride(), *weight.stride(), *((0, 0) if gate is None else gate.stride()),
                0 if residual is None else residual.stride(0), N if parts is not out else out.stride(0),
                0 if saved is None else saved.stride(0),
                first_column, *dropout,
                ACTIVATION=activation, GATED=gate is not None, HAS_BIAS=bias is not None,
                HAS_GATE_BIAS=gate_bias is not None, HAS_RESIDUAL=residual is not None,
                HAS_DROPOUT=dropout_seed is not None, HAS_SCALE=scale is not None and late_scale is None,
                SAVE=saved is not None, **how, EVEN_K=K % tile.tile_k == 0,
                TILE_M=tile.tile_m, TILE_N=tile.tile_n, TILE_K=tile.tile_k, GROUP_ROWS=GROUP_ROWS,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
                **limit,
            )  # fmt: skip
        if parts is not out:
            sum_parts(parts, out, late_scale)

    # Out of tensor memory, the whole accumulator is in registers with what tanh needs, too.
    curved = ("gelu", "gelu_tanh") if target_of(x).tensor_memory else ("gelu",)
    heavy = int(activation in curved or residual is not None or saved is not None or dropout_seed is not None)
    if x.dtype == torch.float32:
        heavy = (
            heavy if gate is None and _is_aligned(out) else 2
        )  # stores element by element, each with its own address
    elif target_of(x).tensor_memory and (out.dtype != x.dtype or split or not _is_aligned(out)):
        heavy = max(
            heavy, 1 if scale is None else 2
        )  # the whole accumulator comes to registers at once, to be stored in float32
    launch(
        _choose(
            "linear",
            x,
            (weight, gate),
            N,
            launch,
            heavy=int(heavy),
            split=split,
            repeatable=residual is not out,
        )
    )
    return out


def hidden_backward(
    grad: Tensor,
    w_out: Tensor,
    saved: Tensor,
    gate_saved: Tensor | None,
    activation: str,
    *,
    need_hidden: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of what the activation of a feed-forward block was given.

    grad (M, N), w_out (N, F) of any strides, saved and gate_saved (M, F) contiguous. Returns the gradients of
    saved and of gate_saved, the hidden layer if ``need_hidden``, and if ``need_sums`` the column sums of both
    gradients, in float32 and rounded once.
    """
    M, K = grad.shape
    N = saved.shape[1]
    dup = torch.empty_like(saved)
    dgate = None if gate_saved is None else torch.empty_like(saved)
    hidden = torch.empty_like(saved) if need_hidden else None
    sums: list[Tensor | None] = [None, None]
    parts: list[Tensor | None] = [None, None]

    def launch(tile: GemmTile) -> None:
        operands, how = _operands(grad, (w_out,), tile)
        for i in range((1 + (dgate is not None)) if need_sums else 0):
            parts[i] = torch.empty(cdiv(M, tile.tile_m), N, dtype=torch.float32, device=grad.device)
        with on_device(grad):
            hidden_backward_kernel[(_programs(tile, M, N, target_of(grad)),)](
                *operands, saved, gate_saved, dup, dgate, hidden, *parts,
                M, N, K, *grad.stride(), *w_out.stride(), saved.stride(0),
                ACTIVATION=activation, GATED=gate_saved is not None, NEED_HIDDEN=need_hidden,
                NEED_SUMS=need_sums, **how, EVEN_K=K % tile.tile_k == 0,
                TILE_M=tile.tile_m, TILE_N=tile.tile_n, TILE_K=tile.tile_k, GROUP_ROWS=GROUP_ROWS,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip

    if M and N:
        launch(_choose("hidden_backward", grad, (w_out,), N, launch, heavy=2 if gate_saved is None else 3))
    if need_sums:
        for i, part in enumerate(parts if M and N else []):
            sums[i] = None if part is None else sum_parts(part, saved.new_empty(N))
        if not (M and N):
            sums = [saved.new_zeros(N) for _ in sums]
    return dup, dgate, hidden, sums[0], sums[1]


def output_backward(
    grad: Tensor,
    saved: Tensor | None,
    activation: str,
    dropout_seed: Tensor | None,
    dropout: tuple[int, float],
) -> Tensor:
    """The gradient of ``dropout(activation(saved))``: matrices (M, N) with contiguous rows; contiguous."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    rows, columns = grad.shape
    if out.numel() == 0:
        return out
    tile_columns = min(1024, max(32, next_power_of_2(columns)))
    tile_rows = 2048 // tile_columns
    with on_device(grad):
        output_backward_kernel[(cdiv(rows, tile_rows), cdiv(columns, tile_columns))](
            grad, saved, dropout_seed, out, rows, columns,
            grad.stride(0), 0 if saved is None else saved.stride(0), *dropout,
            ACTIVATION=activation, HAS_DROPOUT=dropout_seed is not None,
            TILE_ROWS=tile_rows, TILE_COLUMNS=tile_columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
