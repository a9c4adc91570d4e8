"""Linear layer in Triton: ``layer_norm(activation(x @ W + b) + residual)``.

One matrix product with everything that follows it, short of the norm, done on the accumulator before it
leaves the registers::

                      N (out)                    programs walk the output in columns of GROUP_ROWS tiles, so
                 +----+----+----+                that those running together share x and W tiles in the L2:
        K        | W  |    |    |
     +------+    +----+----+----+                        1  3 |  5  7
     |  x   | -> | C  |    |    |  M (tokens)            2  4 |  6  8     (GROUP_ROWS = 2)
     +------+    +----+----+----+

    C = sum over K tiles of x_tile @ W_tile        float32 accumulator
    C = activation(C + bias) + residual            float32, rounded once, stored

``W`` is addressed by its two strides alone, so that ``nn.Linear`` (out, in) and GPT-2's ``Conv1D`` (in, out)
are the same kernel without a copy. Several weights (the Q, K and V projections) are several launches, each
writing its own slice of the output; a LayerNorm needs whole rows and runs as a second kernel
(``ops/norm/triton.py``).

The tile order is that of the Triton matrix multiplication tutorial. Activations: Hendrycks and Gimpel,
Gaussian Error Linear Units, arXiv 1606.08415.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import Target, on_device, target_of, unsupported
from ..norm import triton as norm

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


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
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_rm, stride_om,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Which tile of the output is ours.
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    group_size = GROUP_ROWS * tiles_n
    first_m = (program // group_size) * GROUP_ROWS
    rows_in_group = min(tiles_m - first_m, GROUP_ROWS)
    tile_m = first_m + (program % group_size) % rows_in_group
    tile_n = (program % group_size) // rows_in_group

    rows = tile_m * TILE_M + tl.arange(0, TILE_M)
    columns = tile_n * TILE_N + tl.arange(0, TILE_N)
    depth = tl.arange(0, TILE_K)
    # Rows and columns past the edge wrap round instead of being masked: they read valid memory, and what they
    # compute is not stored. 64-bit row offsets: a matrix may have more than 2^31 elements.
    x_rows = (rows % M).to(tl.int64)
    w_columns = (columns % N).to(tl.int64)
    x_tile = x_ptr + x_rows[:, None] * stride_xm + depth[None, :] * stride_xk
    w_tile = w_ptr + depth[:, None].to(tl.int64) * stride_wk + w_columns[None, :] * stride_wn

    accumulator = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for k in range(0, K, TILE_K):
        if EVEN_K:
            x = tl.load(x_tile)
            w = tl.load(w_tile)
        else:
            x = tl.load(x_tile, mask=depth[None, :] < K - k, other=0.0)
            w = tl.load(w_tile, mask=depth[:, None] < K - k, other=0.0)
        # "ieee": float32 products in full precision, not TF32. It changes nothing for 16-bit operands.
        accumulator = tl.dot(x, w, accumulator, input_precision="ieee")
        x_tile += TILE_K * stride_xk
        w_tile += TILE_K * stride_wk

    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    accumulator = activate(accumulator, ACTIVATION)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    # A 64-bit offset for the tile and 32-bit ones within it, which leave registers to the accumulator.
    first_row = (tile_m * TILE_M).to(tl.int64)
    local_rows = tl.arange(0, TILE_M)[:, None]
    if HAS_RESIDUAL:
        residual = residual_ptr + first_row * stride_rm + (local_rows * stride_rm + columns[None, :])
        accumulator += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + first_row * stride_om + (local_rows * stride_om + columns[None, :])
    tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


class GemmTile(NamedTuple):
    """Tile of the output, depth of a step of the K loop, and how a program executes it."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int


# Tiles that keep their accumulator in registers; larger ones reuse operands more, smaller ones fill a device
# with less work.
_HALF_TILES = (
    GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 8, 3), GemmTile(128, 64, 64, 4, 4),
    GemmTile(64, 128, 64, 4, 4), GemmTile(64, 64, 64, 4, 4), GemmTile(32, 64, 64, 4, 5),
    GemmTile(16, 64, 128, 4, 4), GemmTile(16, 32, 128, 2, 4),
)  # fmt: skip
_FLOAT_TILES = (
    GemmTile(64, 64, 32, 4, 3), GemmTile(32, 64, 32, 4, 3), GemmTile(32, 32, 32, 4, 3),
    GemmTile(16, 32, 64, 2, 3),
)  # fmt: skip


def gemm_tile(
    M: int, N: int, K: int, itemsize: int, target: Target, heavy: bool = False, aligned: bool = True
) -> GemmTile:
    """The tile with the least modelled time for an (M, K) by (K, N) product.

    A wave is one tile on every processor. Its time is modelled as the tile's multiplications plus the
    operands it loads per step of K, ``tile_m * tile_n + 48 * (tile_m + tile_n)``: 48 is about the ratio of
    arithmetic to L2 bandwidth, in multiplications per element, of the devices the kernels are for. The last,
    partly filled wave costs a whole one.

    ``heavy``: the epilogue needs registers of its own (erf, a residual). ``aligned``: rows start at
    multiples of 16 bytes, so that loads are vectors.
    """

    def cost(tile: GemmTile) -> float:
        tiles = triton.cdiv(M, tile.tile_m) * triton.cdiv(N, tile.tile_n)
        waves = triton.cdiv(tiles, target.processors)
        return waves * (tile.tile_m * tile.tile_n + 48 * (tile.tile_m + tile.tile_n))

    if itemsize == 4:
        best = min(_FLOAT_TILES, key=cost)
    else:
        # The largest tile fills the registers: it needs the warpgroups' matrix unit and a light epilogue.
        best = min(_HALF_TILES if target.warpgroups and not heavy else _HALF_TILES[1:], key=cost)
    if not aligned:  # every element is a load of its own, with its own address
        best = best._replace(tile_m=min(best.tile_m, 64), tile_n=min(best.tile_n, 64), tile_k=32, num_warps=8)
    tile_k = min(best.tile_k, max(16, triton.next_power_of_2(K)))
    step = (best.tile_m + best.tile_n) * tile_k * itemsize
    stages = max(1, min(best.num_stages, target.shared_memory // step))
    return best._replace(tile_k=tile_k, num_stages=stages)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    activation: str,
    residual: Tensor | None,
    conv1d: bool,
) -> None:
    """``out[:] = activation(x @ weight + bias) + residual`` on matrices.

    ``x`` (M, K), ``weight`` (N, K), or (K, N) if ``conv1d``, ``out`` and ``residual`` (M, N) with contiguous
    rows.
    """
    M, K = x.shape
    N = out.shape[1]
    if M == 0 or N == 0:
        return
    stride_wk, stride_wn = weight.stride() if conv1d else weight.stride()[::-1]
    vector = 16 // x.element_size()
    aligned = all(s == 1 or s % vector == 0 for s in (*x.stride(), stride_wk, stride_wn)) and K % vector == 0
    heavy = activation == "gelu" or residual is not None
    tile = gemm_tile(M, N, K, x.element_size(), target_of(x), heavy, aligned)
    with on_device(x):
        linear_kernel[(triton.cdiv(M, tile.tile_m) * triton.cdiv(N, tile.tile_n),)](
            x, weight, bias, residual, out,
            M, N, K,
            x.stride(0), x.stride(1), stride_wk, stride_wn,
            0 if residual is None else residual.stride(0), out.stride(0),
            ACTIVATION=activation, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            EVEN_K=K % tile.tile_k == 0,
            TILE_M=tile.tile_m, TILE_N=tile.tile_n, TILE_K=tile.tile_k, GROUP_ROWS=8,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
) -> Tensor:
    """``norm(activation(x @ concat(weights) + concat(biases)) + residual)``: (..., in) to (..., out)."""
    conv1d = weight_layout == "conv1d"
    widths = [weight.shape[1 if conv1d else 0] for weight in weights]
    out = torch.empty((*x.shape[:-1], sum(widths)), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.shape[:-1].numel()
    x_rows = x.reshape(rows, x.shape[-1])
    out_rows = out.view(rows, out.shape[-1])
    residual_rows = None
    if residual is not None:
        residual_rows = residual.reshape(rows, out.shape[-1])
        if residual_rows.stride(1) != 1:
            residual_rows = residual_rows.contiguous()
    start = 0
    for i, (weight, width) in enumerate(zip(weights, widths, strict=True)):
        columns = slice(start, start + width)
        launch(
            x_rows,
            weight,
            biases[i].contiguous() if biases else None,
            out_rows[:, columns],
            activation=activation,
            residual=None if residual_rows is None else residual_rows[:, columns],
            conv1d=conv1d,
        )
        start += width
    return out if norm_weight is None else norm.run(out, norm_weight, norm_bias, norm_eps)


def supports(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
) -> str | None:
    """Why this call cannot run here, or None."""
    if reason := unsupported("x", x):
        return reason
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    for weight in weights:
        if weight.dtype != x.dtype:
            return f"a weight is {weight.dtype} and x is {x.dtype}; the product needs one dtype"
    out_features = sum(weight.shape[1 if weight_layout == "conv1d" else 0] for weight in weights)
    if norm_weight is not None and out_features > norm.MAX_COLUMNS:
        return f"the norm is over {out_features} features; the Triton kernel takes up to {norm.MAX_COLUMNS}"
    return None
