"""LayerNorm with an optional residual, in Triton: ``LN(x + residual) * weight + bias`` over the last axis.

    Ba, Kiros, Hinton: Layer Normalization, arXiv 1607.06450.

The operation is bound by memory: each element is read once and written once, so a program holds whole rows in
registers and makes its three passes (mean, variance of the centred values, scale) there::

              columns (padded to a power of two)
            +--------------------------------------+
     rows   |  one program: TILE_ROWS whole rows   |   statistics in float32, one rounding at the store
            +--------------------------------------+

The variance is that of the centred values, never ``E[x^2] - E[x]^2``, which cancels for rows with a large
mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import on_device, unsupported

MAX_COLUMNS = 32_768
"""A row is held in the registers of one program: 1024 threads times 32 float32 values."""


@triton.jit
def normalise(values, column_mask, columns, eps):
    """Rows of ``values`` (float32, zero where ``column_mask`` is false) to mean 0 and variance 1."""
    mean = tl.sum(values, axis=1) / columns
    centred = tl.where(column_mask, values - mean[:, None], 0.0)
    # What rounding left of a large mean; in registers a second look costs no memory traffic.
    centred = tl.where(column_mask, centred - (tl.sum(centred, axis=1) / columns)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / columns
    return centred * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr,
    rows, columns, x_stride, residual_stride, out_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    in_columns = (column < columns)[None, :]
    mask = (row < rows)[:, None] & in_columns

    values = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = residual_ptr + row[:, None] * residual_stride + column[None, :]
        values += tl.load(residual, mask=mask, other=0.0).to(tl.float32)

    values = normalise(values, in_columns, columns, eps)
    if HAS_WEIGHT:
        values *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        values += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]

    out = out_ptr + row[:, None] * out_stride + column[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=mask)


class RowTile(NamedTuple):
    """How many rows a program takes, and the width a row is padded to."""

    tile_rows: int
    tile_columns: int
    num_warps: int


def row_tile(rows: int, columns: int) -> RowTile:
    """About 4096 elements per program (32 per thread, 16-byte loads), more only when one row is longer."""
    tile_columns = max(16, triton.next_power_of_2(columns))
    tile_rows = max(1, min(4096 // tile_columns, triton.next_power_of_2(max(rows, 1)), 16))
    num_warps = max(1, min(32, tile_rows * tile_columns // 1024))
    return RowTile(tile_rows, tile_columns, num_warps)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    """``LN(x + residual)`` over the last dimension of ``x`` (..., N); the result is contiguous."""
    columns = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x_rows = x.reshape(-1, columns)
    residual_rows = None if residual is None else residual.reshape(-1, columns)
    rows = x_rows.shape[0]
    if x_rows.stride(1) != 1:
        x_rows = x_rows.contiguous()
    if residual_rows is not None and residual_rows.stride(1) != 1:
        residual_rows = residual_rows.contiguous()
    tile = row_tile(rows, columns)
    with on_device(x):
        layer_norm_kernel[(triton.cdiv(rows, tile.tile_rows),)](
            x_rows, residual_rows, None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(), out,
            rows, columns,
            x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), columns, eps,
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            TILE_ROWS=tile.tile_rows, TILE_COLUMNS=tile.tile_columns,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> str | None:
    """Why this call cannot run here, or None."""
    if reason := unsupported("x", x):
        return reason
    if x.shape[-1] > MAX_COLUMNS:
        return f"the last dimension is {x.shape[-1]}; the Triton kernel holds rows of up to {MAX_COLUMNS}"
    return None
