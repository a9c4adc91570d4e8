"""LayerNorm and RMSNorm in Triton, with what stands around them: ``norm(dropout(x) + residual)``.

    Ba, Kiros, Hinton: Layer Normalization, arXiv 1607.06450.
    Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv 1910.07467.

Both operations are bound by memory: each element is read once and written once, so a program holds whole rows
in registers and makes its passes (mean, variance of the centred values, scale) there::

              columns (padded to a power of two)
            +--------------------------------------+
     rows   |  one program: TILE_ROWS whole rows   |   statistics in float32, one rounding at the store
            +--------------------------------------+

The variance is that of the centred values, never ``E[x^2] - E[x]^2``, which cancels for rows with a large
mean.

Backward. Nothing but the inputs is kept: a row is normalised again, which costs no memory traffic beyond
reading it. With t = dropout(x) + residual, n = (t - mean) * r its normalised row, w the weight and
g = grad * w (RMSNorm: without the means of t and of g):

    dt = r * (g - mean(g) - n * mean(g * n))        dresidual = dt, dx = dt where kept, scaled
    dweight = sum over rows of grad * n             dbias = sum over rows of grad

A program takes every P-th tile of rows and adds up its own dweight and dbias in registers;
``ops/reduce_triton.py`` adds up those of the P programs, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import cdiv, next_power_of_2, on_device, target_of, unsupported
from ..philox import threshold
from ..philox_triton import keep_elements
from ..reduce_triton import sum_parts_of

MAX_COLUMNS = 32_768
"""A row is held in the registers of one program: 1024 threads times 32 float32 values."""
MAX_COLUMNS_BACKWARD = 8192
"""The backward holds a row, its gradient and two running sums, without spilling."""
MAX_COLUMNS_SUMMED = 4096
"""And a third sum, with dropout."""


@triton.jit
def normalise(values, column_mask, columns, eps, RMS: tl.constexpr):
    """Rows of ``values`` (float32, zero where ``column_mask`` is false) to mean 0 and variance 1.

    RMS: to mean square 1. Returns the rows and the factors that they were scaled by.
    """
    if not RMS:
        mean = tl.sum(values, axis=1) / columns
        values = tl.where(column_mask, values - mean[:, None], 0.0)
        # What rounding left of a large mean; in registers a second look costs no memory traffic.
        values = tl.where(column_mask, values - (tl.sum(values, axis=1) / columns)[:, None], 0.0)
    variance = tl.sum(values * values, axis=1) / columns
    factor = 1.0 / tl.sqrt(variance + eps)
    return values * factor[:, None], factor


@triton.jit
def norm_gradient(grad, normal, factor, columns, RMS: tl.constexpr):
    """The gradient of what was normalised, for that of the normalised rows: the first formula above."""
    along = tl.sum(grad * normal, axis=1) / columns
    dtotal = grad - normal * along[:, None]
    if not RMS:
        dtotal -= (tl.sum(grad, axis=1) / columns)[:, None]
    return dtotal * factor[:, None]


@triton.jit
def _load_total(
    x_ptr, residual_ptr, row, column, mask, x_stride, residual_stride, seed, least, keep_scale,
    HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, SUMMED: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dropout(x) + residual in float32, which x is already if SUMMED, and which elements of it are kept."""
    values = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    keep = mask
    if HAS_DROPOUT:
        keep = keep_elements(seed, least, row, 0, TILE_COLUMNS)
        if not SUMMED:
            values = tl.where(keep, values * keep_scale, 0.0)
    if HAS_RESIDUAL:
        residual = residual_ptr + row[:, None] * residual_stride + column[None, :]
        values += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    return values, keep


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr,
    rows, columns, x_stride, residual_stride, out_stride, eps, weight_offset, least, keep_scale,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    in_columns = (column < columns)[None, :]
    mask = (row < rows)[:, None] & in_columns
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    values, _keep = _load_total(
        x_ptr, residual_ptr, row, column, mask, x_stride, residual_stride, seed, least, keep_scale,
        HAS_RESIDUAL, HAS_DROPOUT, False, TILE_COLUMNS,
    )  # fmt: skip
    values, _factor = normalise(values, in_columns, columns, eps, RMS)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        values *= (weight + weight_offset)[None, :]
    if HAS_BIAS:
        values += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]

    out = out_ptr + row[:, None] * out_stride + column[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    grad_ptr, x_ptr, residual_ptr, weight_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, sums_ptr,
    rows, columns, parts_stride, grad_stride, x_stride, residual_stride,
    eps, weight_offset, least, keep_scale,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SUMMED: tl.constexpr, NEED_X: tl.constexpr, NEED_RESIDUAL: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr, NEED_SUMS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE_COLUMNS)
    in_columns = (column < columns)[None, :]
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    dweight = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    dbias = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)

    for tile in range(program, tl.cdiv(rows, TILE_ROWS), tl.num_programs(0)):
        row = (tile * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & in_columns
        values, keep = _load_total(
            x_ptr, residual_ptr, row, column, mask, x_stride, residual_stride, seed, least, keep_scale,
            HAS_RESIDUAL, HAS_DROPOUT, SUMMED, TILE_COLUMNS,
        )  # fmt: skip
        normal, factor = normalise(values, in_columns, columns, eps, RMS)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)

        if NEED_WEIGHT:
            dweight += grad * normal
        if NEED_BIAS:
            dbias += grad
        if NEED_X or NEED_RESIDUAL or NEED_SUMS:
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
                grad *= (weight + weight_offset)[None, :]
            dtotal = norm_gradient(grad, normal, factor, columns, RMS)
            place = row[:, None] * columns + column[None, :]
            if NEED_RESIDUAL:
                tl.store(dresidual_ptr + place, dtotal.to(dresidual_ptr.dtype.element_ty), mask=mask)
            if HAS_DROPOUT:
                dtotal = tl.where(keep, dtotal * keep_scale, 0.0)
            if NEED_SUMS:
                sums += dtotal
            if NEED_X:
                tl.store(dx_ptr + place, dtotal.to(dx_ptr.dtype.element_ty), mask=mask)

    place = program * parts_stride + column
    if NEED_WEIGHT:
        tl.store(dweight_ptr + place, tl.sum(dweight, axis=0), mask=column < columns)
    if NEED_BIAS:
        tl.store(dbias_ptr + place, tl.sum(dbias, axis=0), mask=column < columns)
    if NEED_SUMS:
        tl.store(sums_ptr + place, tl.sum(sums, axis=0), mask=column < columns)


class RowTile(NamedTuple):
    """How many rows a program takes, and the width a row is padded to."""

    tile_rows: int
    tile_columns: int
    num_warps: int


def row_tile(rows: int, columns: int) -> RowTile:
    """About 4096 elements per program (32 per thread, 16-byte loads), more only when one row is longer."""
    tile_columns = max(32, next_power_of_2(columns))
    tile_rows = max(1, min(4096 // tile_columns, next_power_of_2(max(rows, 1)), 16))
    num_warps = max(1, min(32, tile_rows * tile_columns // 1024))
    return RowTile(tile_rows, tile_columns, num_warps)


def backward_row_tile(rows: int, columns: int) -> RowTile:
    """16 elements per thread: of each a value, its gradient and up to three running sums are in registers."""
    tile_columns = max(32, next_power_of_2(columns))
    tile_rows = max(1, min(2048 // tile_columns, next_power_of_2(max(rows, 1)), 16))
    num_warps = max(1, min(32, tile_rows * tile_columns // 512))
    return RowTile(tile_rows, tile_columns, num_warps)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., N) as (rows, N) with contiguous rows; a view where strides allow it."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.shape[-1] else tensor.new_empty(0, 0)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The least Philox word that is kept, and what a kept element is multiplied by."""
    return threshold(dropout_p), 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    weight_offset: float,
    rms: bool,
) -> Tensor:
    columns = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x_rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    rows = x_rows.shape[0]
    tile = row_tile(rows, columns)
    least, keep_scale = dropout_arguments(dropout_p)
    with on_device(x):
        norm_kernel[(cdiv(rows, tile.tile_rows),)](
            x_rows, residual_rows, None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(), dropout_seed, out,
            rows, columns,
            x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), columns,
            eps, weight_offset, least, keep_scale,
            RMS=rms, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, HAS_DROPOUT=dropout_seed is not None,
            TILE_ROWS=tile.tile_rows, TILE_COLUMNS=tile.tile_columns,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """``LN(dropout(x) + residual)`` over the last dimension of ``x`` (..., N); the result is contiguous."""
    return _run(x, weight, bias, eps, residual, dropout_seed, dropout_p, 0.0, False)


def run_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> Tensor:
    """``t / rms(t) * (weight_offset + weight)`` with t = ``dropout(x) + residual``; contiguous."""
    return _run(x, weight, None, eps, residual, dropout_seed, dropout_p, weight_offset, True)


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    kind: str,
    eps: float,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    needs: Sequence[bool],
    summed: bool = False,
) -> list[Tensor]:
    """Gradients of [x, residual, weight, bias]; an empty tensor (0,) where not needed.

    ``summed``: x is dropout(x) + residual already, and residual is None. A fifth value in ``needs`` asks for
    a fifth result, the column sums of the gradient of x, of up to MAX_COLUMNS_SUMMED columns.
    """
    need_x, need_residual, need_weight, need_bias, need_sums = (*needs, False)[:5]
    columns = x.shape[-1]
    results = [x.new_empty(0) for _ in needs]
    if need_x:
        results[0] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if need_residual:
        results[1] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        for i in range(2, len(needs)):
            if needs[i]:
                results[i] = x.new_zeros(columns)
        return results
    grad_rows, x_rows = as_rows(grad), as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    rows = x_rows.shape[0]
    tile = backward_row_tile(rows, columns)
    # Two to four programs per processor hide each other's latency; more would only lengthen the second stage.
    # The registers of dropout leave room for three.
    small = 4 if dropout_seed is None else 3
    programs = min(
        cdiv(rows, tile.tile_rows), target_of(x).processors * (small if tile.num_warps <= 4 else 2)
    )
    wanted = [i for i in range(2, len(needs)) if needs[i]]
    parts = torch.empty(programs, len(wanted), columns, dtype=torch.float32, device=x.device)
    places: list[Tensor | None] = [None] * 5
    for part, i in enumerate(wanted):
        places[i] = parts[:, part]
    least, keep_scale = dropout_arguments(dropout_p)
    with on_device(x):
        norm_backward_kernel[(programs,)](
            grad_rows, x_rows, residual_rows, None if weight is None else weight.contiguous(), dropout_seed,
            results[0] if need_x else None, results[1] if need_residual else None,
            *places[2:], rows, columns, parts.stride(0), grad_rows.stride(0), x_rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            eps, weight_offset, least, keep_scale,
            RMS=kind == "rms_norm", HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
            HAS_DROPOUT=dropout_seed is not None, SUMMED=summed,
            NEED_X=need_x, NEED_RESIDUAL=need_residual, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
            NEED_SUMS=need_sums, TILE_ROWS=tile.tile_rows, TILE_COLUMNS=tile.tile_columns,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    for i in wanted:
        results[i] = x.new_empty(columns)
    if wanted:
        sum_parts_of(parts, [results[i] for i in wanted])
    return results


def _supports(name: str, x: Tensor, limit: int) -> str | None:
    if reason := unsupported(name, x):
        return reason
    if x.shape[-1] > limit:
        return f"the last dimension is {x.shape[-1]}; the Triton kernel holds rows of up to {limit}"
    return None


def supports(x: Tensor, *rest: object, **options: object) -> str | None:
    """Why this call cannot run here, or None."""
    return _supports("x", x, MAX_COLUMNS)


supports_rms_norm = supports


def supports_backward(grad: Tensor, x: Tensor, *rest: object, **options: object) -> str | None:
    """Why this call cannot run here, or None."""
    return _supports("x", x, MAX_COLUMNS_BACKWARD)
