"""Sums over rows in Triton, bit-identical between runs: what the gradients of parameters end in.

No atomic additions, whose order changes from run to run. A sum over many rows is made in two stages, each in
a fixed order::

     rows    +-----------+                       part    +-----------+
     0..     | program 0 |  --> row 0 of parts     0     |           |
             +-----------+                         1     |           | --> sum over the parts, rounded once
     R..     | program 1 |  --> row 1 of parts     2     |           |
             +-----------+                               +-----------+
                 ...           float32                    one program per block of columns

:func:`column_sums` is both stages; kernels that have rows in registers anyway make the parts themselves and
end in :func:`sum_parts`. So does a matrix product that is split over its contracted dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import cdiv, next_power_of_2, on_device, target_of


@triton.jit
def sum_parts_kernel(
    parts_ptr, out_ptr, out1_ptr, out2_ptr, scale_ptr, parts, columns, stride_part, stride_out,
    HAS_SCALE: tl.constexpr, TILE_PARTS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Several results are sums of as many parts; each has programs of its own.
    if tl.program_id(1) == 1:
        out_ptr = out1_ptr
    elif tl.program_id(1) == 2:
        out_ptr = out2_ptr
    parts_ptr += tl.program_id(1).to(tl.int64) * stride_out
    column = tl.program_id(0).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    part = tl.arange(0, TILE_PARTS)
    in_columns = (column < columns)[None, :]
    total = tl.zeros((TILE_PARTS, TILE_COLUMNS), dtype=tl.float32)
    for start in range(0, parts, TILE_PARTS):
        rows = (start + part)[:, None]
        total += tl.load(
            parts_ptr + rows.to(tl.int64) * stride_part + column[None, :],
            mask=(rows < parts) & in_columns,
            other=0.0,
        ).to(tl.float32)
    sums = tl.sum(total, axis=0)
    if HAS_SCALE:
        sums *= tl.load(scale_ptr)
    tl.store(out_ptr + column, sums.to(out_ptr.dtype.element_ty), mask=column < columns)


def sum_parts(parts: Tensor, out: Tensor, scale: Tensor | None = None) -> Tensor:
    """``out[:] = scale * parts.sum(0)``: parts (P, ...), contiguous as out with ``parts[0]``'s elements.

    ``scale``: a float32 scalar on the device.
    """
    sum_parts_of(parts.view(parts.shape[0], 1, out.numel()), [out], scale)
    return out


def sum_parts_of(parts: Tensor, outs: Sequence[Tensor], scale: Tensor | None = None) -> None:
    """``outs[i][:] = scale * parts[:, i].sum(0)``, up to three in one launch: parts (P, len(outs), columns)
    with contiguous columns, outs contiguous.
    """
    count, _, columns = parts.shape
    if count == 0:
        for out in outs:
            out.zero_()
        return
    # Few parts: long columns, loads of 16 bytes. Many parts: narrow columns, for programs enough, and most of
    # the loads on their way together, for there is little else to wait with.
    tile_parts = min(next_power_of_2(count), 256)
    tile_columns = max(32, 2048 // tile_parts)
    for first in range(0, len(outs), 3):
        some = outs[first : first + 3]
        with on_device(parts):
            sum_parts_kernel[(cdiv(columns, tile_columns), len(some))](
                parts[:, first], *(some[min(i, len(some) - 1)] for i in range(3)), scale,
                count, columns, parts.stride(0), parts.stride(1),
                HAS_SCALE=scale is not None, TILE_PARTS=tile_parts, TILE_COLUMNS=tile_columns,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


@triton.jit
def column_parts_kernel(
    x_ptr, parts_ptr, rows, columns, stride_row, rows_per_part,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_columns = (column < columns)[None, :]
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    end = tl.minimum((part + 1) * rows_per_part, rows)
    for start in range(part * rows_per_part, end, TILE_ROWS):
        row = (start + tl.arange(0, TILE_ROWS))[:, None]
        values = tl.load(
            x_ptr + row.to(tl.int64) * stride_row + column[None, :], mask=(row < end) & in_columns, other=0.0
        )
        total += values.to(tl.float32)
    tl.store(parts_ptr + part * columns + column, tl.sum(total, axis=0), mask=column < columns)


def column_sums(x: Tensor, out: Tensor) -> Tensor:
    """``out[:] = x.sum(0)`` in float32, rounded once: x (rows, columns), rows contiguous, out (columns,)."""
    column_sums_of(x, [out])
    return out


def column_sums_of(x: Tensor, outs: Sequence[Tensor]) -> None:
    """The sums of the columns of x, the first in the first of outs and so on."""
    rows, columns = x.shape
    if rows == 0:
        for out in outs:
            out.zero_()
        return
    tile_rows, tile_columns = 32, 128
    blocks = cdiv(columns, tile_columns)
    # Enough programs to fill the device; each adds at least a tile of rows.
    count = max(1, min(cdiv(rows, tile_rows), 4 * target_of(x).processors // blocks, 64))
    rows_per_part = cdiv(cdiv(rows, count), tile_rows) * tile_rows
    count = cdiv(rows, rows_per_part)
    parts = torch.empty(count, columns, dtype=torch.float32, device=x.device)
    with on_device(x):
        column_parts_kernel[(blocks, count)](
            x, parts, rows, columns, x.stride(0), rows_per_part,
            TILE_ROWS=tile_rows, TILE_COLUMNS=tile_columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    widths = [out.numel() for out in outs]
    if len(set(widths)) == 1:
        sum_parts_of(parts.view(count, len(outs), widths[0]), outs)
    else:
        for part, out in zip(parts.split(widths, 1), outs, strict=True):
            sum_parts_of(part.unsqueeze(1), [out])
