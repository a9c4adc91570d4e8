"""Token embedding in Triton: ``dropout(LN(word[id] + position[position_id] + token_type[type_id]))``, one
pass.

    Devlin et al.: BERT, arXiv 1810.04805, figure 2.

A program gathers whole rows of up to three tables for TILE_ROWS tokens, adds them in float32, normalises them
in registers (``ops/norm/triton.py``) and writes the result once; eager PyTorch writes and reads back three
sums.

A kernel cannot raise. An id outside its table is never followed: its row becomes NaN, the id is left in
``bad_ids`` for its table, and the host, which reads that after the launch, raises IndexError. Reading waits
for the stream; while a CUDA graph is being captured nothing can be read, and the NaN rows are all there is to
see.

Backward. The rows are gathered and normalised again, and the norm's backward gives the gradient dT of the sum
(``ops/norm/triton.py``: dweight and dbias end in two stages). A row of a table gets the sum of dT over the
tokens with its id, bit-identical between runs: ids are sorted (stably), so that the tokens of an id stand
side by side, and a program sums the runs of equal ids within a block of them::

    sorted ids   3 3 3 5 | 5 5 5 5 | 5 8 9 9       blocks of BLOCK tokens
                 ----- - | ------- | - - ---
    written to   dT[3]  tail  head   head [8] [9]  tail: goes on in the next block; head: began before

Within a block the sums are one product with the matrix of "same id". A second kernel adds up each tail and
the heads that follow it, in order. No atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import cdiv, next_power_of_2, on_device, target_of, unsupported
from ..norm.triton import (
    MAX_COLUMNS,
    MAX_COLUMNS_BACKWARD,
    as_rows,
    backward_row_tile,
    dropout_arguments,
    norm_gradient,
    normalise,
    row_tile,
)
from ..philox_triton import keep_elements
from ..reduce_triton import sum_parts_of

_NO_BAD_ID = -(2**63)


@triton.jit
def _gather(
    values, valid, ids_ptr, stride_row, stride_column, table_ptr, table_stride, table_rows, bad_ptr,
    token_row, token_column, token_mask, column, column_mask,
):  # fmt: skip
    """``values`` plus the rows of a table that its ids name; ``valid`` loses tokens with an id outside."""
    ids = tl.load(ids_ptr + token_row * stride_row + token_column * stride_column, mask=token_mask, other=0)
    ids = ids.to(tl.int64)
    inside = (ids >= 0) & (ids < table_rows)
    tl.store(bad_ptr + tl.zeros_like(ids), ids, mask=token_mask & ~inside)
    rows = table_ptr + ids[:, None] * table_stride + column[None, :]
    values += tl.load(rows, mask=(token_mask & inside)[:, None] & column_mask, other=0.0).to(tl.float32)
    return values, valid & inside


@triton.jit
def _gather_all(
    ids_ptr, word_ptr, position_ids_ptr, position_ptr, type_ids_ptr, type_ptr, bad_ids_ptr,
    token, token_mask, sequence_length, column, column_mask,
    stride_ids_row, stride_ids_column, stride_position_row, stride_position_column,
    stride_type_row, stride_type_column,
    word_stride, position_stride, type_stride, word_rows, position_rows, type_rows,
    HAS_POSITION: tl.constexpr, HAS_TYPE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of the tables' rows for these tokens, and which tokens have all ids inside."""
    token_row = token // sequence_length
    token_column = token % sequence_length
    values = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    values, valid = _gather(
        values, token_mask, ids_ptr, stride_ids_row, stride_ids_column, word_ptr, word_stride, word_rows,
        bad_ids_ptr, token_row, token_column, token_mask, column, column_mask,
    )  # fmt: skip
    if HAS_POSITION:
        values, valid = _gather(
            values, valid, position_ids_ptr, stride_position_row, stride_position_column, position_ptr,
            position_stride, position_rows, bad_ids_ptr + 1, token_row, token_column, token_mask, column,
            column_mask,
        )  # fmt: skip
    if HAS_TYPE:
        values, valid = _gather(
            values, valid, type_ids_ptr, stride_type_row, stride_type_column, type_ptr, type_stride,
            type_rows, bad_ids_ptr + 2, token_row, token_column, token_mask, column, column_mask,
        )  # fmt: skip
    return values, valid


@triton.jit
def embedding_kernel(
    ids_ptr, word_ptr, position_ids_ptr, position_ptr, type_ids_ptr, type_ptr, bad_ids_ptr,
    weight_ptr, bias_ptr, seed_ptr, out_ptr,
    tokens, sequence_length, columns,
    stride_ids_row, stride_ids_column, stride_position_row, stride_position_column,
    stride_type_row, stride_type_column,
    word_stride, position_stride, type_stride, word_rows, position_rows, type_rows, eps, least, keep_scale,
    HAS_POSITION: tl.constexpr, HAS_TYPE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token_mask = token < tokens
    column = tl.arange(0, TILE_COLUMNS)
    column_mask = (column < columns)[None, :]
    values, valid = _gather_all(
        ids_ptr, word_ptr, position_ids_ptr, position_ptr, type_ids_ptr, type_ptr, bad_ids_ptr,
        token, token_mask, sequence_length, column, column_mask,
        stride_ids_row, stride_ids_column, stride_position_row, stride_position_column,
        stride_type_row, stride_type_column,
        word_stride, position_stride, type_stride, word_rows, position_rows, type_rows,
        HAS_POSITION, HAS_TYPE, TILE_ROWS, TILE_COLUMNS,
    )  # fmt: skip
    if HAS_NORM:
        values, _factor = normalise(values, column_mask, columns, eps, False)
        values *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            values += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if HAS_DROPOUT:
        keep = keep_elements(tl.load(seed_ptr), least, token, 0, TILE_COLUMNS)
        values = tl.where(keep, values * keep_scale, 0.0)
    values = tl.where(valid[:, None], values, float("nan"))
    out = out_ptr + token[:, None] * columns + column[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=token_mask[:, None] & column_mask)


@triton.jit
def embedding_backward_kernel(
    ids_ptr, word_ptr, position_ids_ptr, position_ptr, type_ids_ptr, type_ptr, bad_ids_ptr,
    weight_ptr, seed_ptr, grad_ptr, dtotal_ptr, dweight_ptr, dbias_ptr,
    tokens, sequence_length, columns, grad_stride,
    stride_ids_row, stride_ids_column, stride_position_row, stride_position_column,
    stride_type_row, stride_type_column,
    word_stride, position_stride, type_stride, word_rows, position_rows, type_rows, eps, least, keep_scale,
    HAS_POSITION: tl.constexpr, HAS_TYPE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    NEED_TOTAL: tl.constexpr, NEED_PARAMETERS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum of the tables' rows, float32, and this program's part of the norm's."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE_COLUMNS)
    column_mask = (column < columns)[None, :]
    dweight = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    dbias = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for tile in range(program, tl.cdiv(tokens, TILE_ROWS), tl.num_programs(0)):
        token = (tile * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
        token_mask = token < tokens
        mask = token_mask[:, None] & column_mask
        grad = tl.load(grad_ptr + token[:, None] * grad_stride + column[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        if HAS_DROPOUT:
            keep = keep_elements(tl.load(seed_ptr), least, token, 0, TILE_COLUMNS)
            grad = tl.where(keep, grad * keep_scale, 0.0)
        if HAS_NORM:
            values, _valid = _gather_all(
                ids_ptr, word_ptr, position_ids_ptr, position_ptr, type_ids_ptr, type_ptr, bad_ids_ptr,
                token, token_mask, sequence_length, column, column_mask,
                stride_ids_row, stride_ids_column, stride_position_row, stride_position_column,
                stride_type_row, stride_type_column,
                word_stride, position_stride, type_stride, word_rows, position_rows, type_rows,
                HAS_POSITION, HAS_TYPE, TILE_ROWS, TILE_COLUMNS,
            )  # fmt: skip
            normal, factor = normalise(values, column_mask, columns, eps, False)
            if NEED_PARAMETERS:
                dweight += grad * normal
                dbias += grad
            weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
            grad = norm_gradient(grad * weight[None, :], normal, factor, columns, False)
        if NEED_TOTAL:
            tl.store(dtotal_ptr + token[:, None] * columns + column[None, :], grad, mask=mask)
    if NEED_PARAMETERS:
        place = program * columns + column
        tl.store(dweight_ptr + place, tl.sum(dweight, axis=0), mask=column < columns)
        tl.store(dbias_ptr + place, tl.sum(dbias, axis=0), mask=column < columns)


@triton.jit
def segment_sum_kernel(
    dtotal_ptr, ids_ptr, order_ptr, out_ptr, heads_ptr, tails_ptr, tokens, columns, table_rows, padding_idx,
    BLOCK: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of the runs of equal ids in one block of sorted tokens, for one tile of columns."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_columns = column < columns
    local = tl.arange(0, BLOCK)
    place = block * BLOCK + local
    inside = place < tokens
    ids = tl.load(ids_ptr + place, mask=inside, other=-1).to(tl.int64)
    order = tl.load(order_ptr + place, mask=inside, other=0)
    mask = inside[:, None] & in_columns[None, :]
    rows = tl.load(dtotal_ptr + order[:, None] * columns + column[None, :], mask=mask, other=0.0)
    same = (ids[:, None] == ids[None, :]).to(tl.float32)
    sums = tl.dot(same, rows, input_precision="ieee")

    before = tl.load(ids_ptr + block * BLOCK - 1, mask=block > 0, other=-1).to(tl.int64)
    after = tl.load(ids_ptr + (block + 1) * BLOCK, mask=(block + 1) * BLOCK < tokens, other=-1).to(tl.int64)
    previous = tl.load(ids_ptr + place - 1, mask=inside & (local > 0), other=-1).to(tl.int64)
    wanted = (ids >= 0) & (ids < table_rows) & (ids != padding_idx)
    first = inside & wanted & ((local == 0) | (ids != previous))
    head = first & (ids == before)
    tail = first & (ids == after) & ~head
    whole = first & ~head & ~tail
    columns_of = in_columns[None, :]
    out = out_ptr + ids[:, None] * columns + column[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=whole[:, None] & columns_of)
    # At most one row of a block is a head, and one a tail.
    part = block * columns + column[None, :] + tl.zeros_like(ids)[:, None]
    tl.store(heads_ptr + part, sums, mask=head[:, None] & columns_of)
    tl.store(tails_ptr + part, sums, mask=tail[:, None] & columns_of)


@triton.jit
def join_segments_kernel(
    ids_ptr, out_ptr, heads_ptr, tails_ptr, tokens, columns, table_rows, padding_idx,
    BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Runs that go on past their first block: its tail and the heads of the blocks that follow."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_columns = column < columns
    start, end = block * BLOCK, (block + 1) * BLOCK
    id_ = tl.load(ids_ptr + tl.minimum(end, tokens) - 1).to(tl.int64)
    after = tl.load(ids_ptr + end, mask=end < tokens, other=-1).to(tl.int64)
    before = tl.load(ids_ptr + start - 1, mask=block > 0, other=-1).to(tl.int64)
    # Sorted: a run that ends this block began before it only if it is all of it.
    if (id_ == after) & (id_ != before) & (id_ >= 0) & (id_ < table_rows) & (id_ != padding_idx):
        total = tl.load(tails_ptr + block * columns + column, mask=in_columns, other=0.0)
        following = block + 1 + tl.arange(0, TILE_BLOCKS)
        going_on = 1
        while going_on != 0:
            ids = tl.load(ids_ptr + following * BLOCK, mask=following * BLOCK < tokens, other=-1)
            ours = ids == id_
            heads = tl.load(
                heads_ptr + following[:, None] * columns + column[None, :],
                mask=ours[:, None] & in_columns[None, :],
                other=0.0,
            )
            total += tl.sum(heads, axis=0)
            following += TILE_BLOCKS
            going_on = tl.min(ours.to(tl.int32), axis=0)
        out = out_ptr + id_ * columns + column
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_columns)


def _as_matrix(ids: Tensor) -> Tensor:
    """(..., S) as (rows, S), a view where strides allow it (a broadcast batch dimension stays broadcast)."""
    return ids.reshape(1, -1) if ids.dim() < 2 else ids.reshape(-1, ids.shape[-1])


def _with_contiguous_rows(table: Tensor) -> Tensor:
    return table if table.stride(1) == 1 else table.contiguous()


def _tables(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
) -> dict[str, tuple[Tensor, Tensor] | None]:
    """By argument, ids as (rows, S) matrices and tables with contiguous rows; None for what is not given."""
    tables: dict[str, tuple[Tensor, Tensor] | None] = {}
    for name, ids, table in (
        ("input_ids", input_ids, word_weight),
        ("position_ids", position_ids, position_weight),
        ("token_type_ids", token_type_ids, token_type_weight),
    ):
        given = ids is not None and table is not None
        tables[name] = (
            (_as_matrix(ids.expand(input_ids.shape)), _with_contiguous_rows(table)) if given else None  # type: ignore[union-attr, arg-type]
        )
    return tables


def _arguments(tables: dict[str, tuple[Tensor, Tensor] | None]) -> tuple[list[Any], list[Any]]:
    """What the kernels get of the tables: pointers, and strides and sizes."""
    pairs = list(tables.values())
    pointers = [tensor for pair in pairs for tensor in (pair or (None, None))]
    strides = [stride for pair in pairs for stride in (pair[0].stride() if pair else (0, 0))]
    rows = [pair[1].stride(0) if pair else 0 for pair in pairs]
    return pointers, [*strides, *rows, *(pair[1].shape[0] if pair else 0 for pair in pairs)]


def run(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dropout_seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    padding_idx: int = -1,
) -> Tensor:
    """Sum of the embeddings, normalised if ``norm_weight`` is given, dropout: ids (...) to (..., hidden).

    Raises IndexError naming the argument and the id if one is outside its table.
    """
    columns = word_weight.shape[1]
    out = torch.empty((*input_ids.shape, columns), dtype=word_weight.dtype, device=word_weight.device)
    if out.numel() == 0:
        return out
    tables = _tables(input_ids, word_weight, position_ids, position_weight, token_type_ids, token_type_weight)
    pointers, sizes = _arguments(tables)
    tokens = input_ids.numel()
    tile = row_tile(tokens, columns)
    bad_ids = torch.full((3,), _NO_BAD_ID, dtype=torch.int64, device=out.device)
    with on_device(out):
        embedding_kernel[(cdiv(tokens, tile.tile_rows),)](
            *pointers, bad_ids, None if norm_weight is None else norm_weight.contiguous(),
            None if norm_bias is None else norm_bias.contiguous(), dropout_seed, out,
            tokens, input_ids.shape[-1] if input_ids.dim() else 1, columns,
            *sizes, norm_eps, *dropout_arguments(dropout_p),
            HAS_POSITION=tables["position_ids"] is not None, HAS_TYPE=tables["token_type_ids"] is not None,
            HAS_NORM=norm_weight is not None, HAS_BIAS=norm_bias is not None,
            HAS_DROPOUT=dropout_seed is not None, TILE_ROWS=tile.tile_rows, TILE_COLUMNS=tile.tile_columns,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    if out.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return out
    for (name, pair), bad in zip(tables.items(), bad_ids.tolist(), strict=True):
        if pair is not None and bad != _NO_BAD_ID:
            raise IndexError(f"{name} holds {bad}; its table has rows 0 to {pair[1].shape[0] - 1}")
    return out


BLOCK = 32
"""Sorted tokens that a program sums at a time."""


def table_gradient(dtotal: Tensor, ids: Tensor, weight: Tensor, padding_idx: int = -1) -> Tensor:
    """Rows of dtotal (tokens, columns), float32, added up by id: a table like ``weight``."""
    out = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    tokens, columns = dtotal.shape
    # A sort of 16 bits makes a quarter of the passes over memory. Ids outside the table stay outside.
    rows = weight.shape[0]
    narrow = next(t for t in (torch.int16, torch.int32, torch.int64) if rows <= torch.iinfo(t).max)
    ids, order = torch.sort(ids.reshape(-1).clamp(-1, rows).to(narrow), stable=True)
    blocks = cdiv(tokens, BLOCK)
    heads, tails = torch.empty(2, blocks, columns, dtype=torch.float32, device=weight.device)
    tile_columns = min(128, max(16, next_power_of_2(columns)))
    grid = (blocks, cdiv(columns, tile_columns))
    sizes = (tokens, columns, weight.shape[0], padding_idx)
    with on_device(weight):
        segment_sum_kernel[grid](
            dtotal, ids, order, out, heads, tails, *sizes,
            BLOCK=BLOCK, TILE_COLUMNS=tile_columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        if blocks > 1:
            join_segments_kernel[grid](
                ids, out, heads, tails, *sizes,
                BLOCK=BLOCK, TILE_BLOCKS=16, TILE_COLUMNS=tile_columns, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def run_backward(
    grad: Tensor,
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dropout_seed: Tensor | None = None,
    *,
    norm_eps: float,
    dropout_p: float = 0.0,
    padding_idx: int = -1,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of [word, position, token_type, norm_weight, norm_bias]; empty (0,) where not needed."""
    results = [word_weight.new_empty(0) for _ in needs]
    weights = (word_weight, position_weight, token_type_weight, norm_weight, norm_bias)
    if grad.numel() == 0:
        return [
            torch.zeros_like(w) if need and w is not None else r
            for need, w, r in zip(needs, weights, results, strict=True)
        ]
    columns = word_weight.shape[1]
    tables = _tables(input_ids, word_weight, position_ids, position_weight, token_type_ids, token_type_weight)
    pointers, sizes = _arguments(tables)
    tokens = input_ids.numel()
    grad_rows = as_rows(grad)
    tile = backward_row_tile(tokens, columns)
    programs = min(
        cdiv(tokens, tile.tile_rows), target_of(grad).processors * (4 if tile.num_warps <= 4 else 2)
    )
    need_total, need_parameters = any(needs[:3]), any(needs[3:])
    dtotal = torch.empty(tokens if need_total else 0, columns, dtype=torch.float32, device=grad.device)
    parts = torch.empty(
        2, programs if need_parameters else 0, columns, dtype=torch.float32, device=grad.device
    )
    bad_ids = torch.empty(3, dtype=torch.int64, device=grad.device)  # the forward has raised for them
    with on_device(grad):
        embedding_backward_kernel[(programs,)](
            *pointers, bad_ids, None if norm_weight is None else norm_weight.contiguous(), dropout_seed,
            grad_rows, dtotal, parts[0], parts[1],
            tokens, input_ids.shape[-1] if input_ids.dim() else 1, columns, grad_rows.stride(0),
            *sizes, norm_eps, *dropout_arguments(dropout_p),
            HAS_POSITION=tables["position_ids"] is not None, HAS_TYPE=tables["token_type_ids"] is not None,
            HAS_NORM=norm_weight is not None, HAS_DROPOUT=dropout_seed is not None,
            NEED_TOTAL=need_total, NEED_PARAMETERS=need_parameters,
            TILE_ROWS=tile.tile_rows, TILE_COLUMNS=tile.tile_columns,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    for i, pair in enumerate(tables.values()):
        if needs[i] and pair is not None:
            results[i] = table_gradient(dtotal, pair[0], pair[1], padding_idx if i == 0 else -1)
    wanted = [i for i in (3, 4) if needs[i]]
    for i in wanted:
        results[i] = word_weight.new_empty(columns)
    if wanted:
        sum_parts_of(parts.transpose(0, 1)[:, wanted[0] - 3 :], [results[i] for i in wanted])
    return results


def _supports(word_weight: Tensor, limit: int) -> str | None:
    if reason := unsupported("word_weight", word_weight):
        return reason
    if word_weight.shape[1] > limit:
        return f"the hidden size is {word_weight.shape[1]}; the Triton kernel holds rows of up to {limit}"
    return None


def supports(input_ids: Tensor, word_weight: Tensor, *rest: object, **options: object) -> str | None:
    """Why this call cannot run here, or None."""
    return _supports(word_weight, MAX_COLUMNS)


def supports_backward(
    grad: Tensor, input_ids: Tensor, word_weight: Tensor, *rest: object, **options: object
) -> str | None:
    """Why this call cannot run here, or None."""
    return _supports(word_weight, MAX_COLUMNS_BACKWARD)
