"""Token embedding in Triton: ``LN(word[id] + position[position_id] + token_type[type_id])`` in one pass.

    Devlin et al.: BERT, arXiv 1810.04805, figure 2.

A program gathers whole rows of up to three tables for TILE_ROWS tokens, adds them in float32, normalises them
in registers (``ops/norm/triton.py``) and writes the result once; eager PyTorch writes and reads back three
sums.

A kernel cannot raise. An id outside its table is never followed: its row becomes NaN, the id is left in
``bad_ids`` for its table, and the host, which reads that after the launch, raises IndexError. Reading waits
for the stream; while a CUDA graph is being captured nothing can be read, and the NaN rows are all there is to
see.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import on_device, unsupported
from ..norm.triton import MAX_COLUMNS, normalise, row_tile

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
def embedding_kernel(
    ids_ptr, word_ptr, position_ids_ptr, position_ptr, type_ids_ptr, type_ptr, weight_ptr, bias_ptr,
    out_ptr, bad_ids_ptr,
    tokens, sequence_length, columns,
    stride_ids_row, stride_ids_column, stride_position_row, stride_position_column,
    stride_type_row, stride_type_column,
    word_stride, position_stride, type_stride, word_rows, position_rows, type_rows, eps,
    HAS_POSITION: tl.constexpr, HAS_TYPE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token_mask = token < tokens
    token_row = token // sequence_length
    token_column = token % sequence_length
    column = tl.arange(0, TILE_COLUMNS)
    column_mask = (column < columns)[None, :]

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

    if HAS_NORM:
        values, _factor = normalise(values, column_mask, columns, eps, False)
        values *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            values += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    values = tl.where(valid[:, None], values, float("nan"))
    out = out_ptr + token[:, None] * columns + column[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=token_mask[:, None] & column_mask)


def _as_matrix(ids: Tensor) -> Tensor:
    """(..., S) as (rows, S), a view where strides allow it (a broadcast batch dimension stays broadcast)."""
    return ids.reshape(1, -1) if ids.dim() < 2 else ids.reshape(-1, ids.shape[-1])


def _with_contiguous_rows(table: Tensor) -> Tensor:
    return table if table.stride(1) == 1 else table.contiguous()


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
) -> Tensor:
    """Sum of the embeddings, normalised if ``norm_weight`` is given: ids (...) to (..., hidden).

    Raises IndexError naming the argument and the id if one is outside its table.
    """
    columns = word_weight.shape[1]
    out = torch.empty((*input_ids.shape, columns), dtype=word_weight.dtype, device=word_weight.device)
    if out.numel() == 0:
        return out
    has_position = position_ids is not None and position_weight is not None
    has_type = token_type_ids is not None and token_type_weight is not None
    arguments = {
        "input_ids": (input_ids, word_weight),
        "position_ids": (position_ids, position_weight) if has_position else (None, None),
        "token_type_ids": (token_type_ids, token_type_weight) if has_type else (None, None),
    }
    ids = [None if i is None else _as_matrix(i.expand(input_ids.shape)) for i, _ in arguments.values()]
    tables = [None if t is None else _with_contiguous_rows(t) for _, t in arguments.values()]
    tokens = input_ids.numel()
    tile = row_tile(tokens, columns)
    bad_ids = torch.full((3,), _NO_BAD_ID, dtype=torch.int64, device=out.device)
    with on_device(out):
        embedding_kernel[(triton.cdiv(tokens, tile.tile_rows),)](
            ids[0], tables[0], ids[1], tables[1], ids[2], tables[2],
            None if norm_weight is None else norm_weight.contiguous(),
            None if norm_bias is None else norm_bias.contiguous(),
            out, bad_ids, tokens, input_ids.shape[-1] if input_ids.dim() else 1, columns,
            *(stride for i in ids for stride in ((0, 0) if i is None else i.stride())),
            *(0 if t is None else t.stride(0) for t in tables),
            *(0 if t is None else t.shape[0] for t in tables),
            norm_eps,
            HAS_POSITION=has_position, HAS_TYPE=has_type, HAS_NORM=norm_weight is not None,
            HAS_BIAS=norm_bias is not None, TILE_ROWS=tile.tile_rows, TILE_COLUMNS=tile.tile_columns,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    if out.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return out
    for (name, (_, table)), bad in zip(arguments.items(), bad_ids.tolist(), strict=True):
        if table is not None and bad != _NO_BAD_ID:
            raise IndexError(f"{name} holds {bad}; its table has rows 0 to {table.shape[0] - 1}")
    return out


def supports(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> str | None:
    """Why this call cannot run here, or None."""
    if reason := unsupported("word_weight", word_weight):
        return reason
    if word_weight.shape[1] > MAX_COLUMNS:
        return (
            f"the hidden size is {word_weight.shape[1]}; the Triton kernel holds rows of up to {MAX_COLUMNS}"
        )
    return None
