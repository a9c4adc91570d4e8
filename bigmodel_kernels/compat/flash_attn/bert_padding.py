"""Padded batches to packed ones and back, with the calls of flash-attention's `flash_attn.bert_padding`."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices`, int (n,), of input (rows, ...): (n, ...). Differentiable; an index may repeat."""
    if input.dim() < 2:
        raise ValueError(f"input has shape {tuple(input.shape)}; it must have at least 2 dimensions")
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values (n, ...) as rows `indices`, int (n,), of a tensor of zeros (first_axis_dim, ...)."""
    if indices.dim() != 1 or values.dim() < 2 or values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"values has shape {tuple(values.shape)} and indices {tuple(indices.shape)}; they must be "
            "(n, ...) and (n,)"
        )
    empty = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return empty.index_put((indices.long(),), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch one after the other.

    Args:
      hidden_states: (B, S, ...). attention_mask: (B, S), bool or int, 1 where a token is. unused_mask:
        (B, S), 1 where there is none, but room is kept for one: those come along.

    Returns (tokens (total, ...), their places in the flattened batch (total,), cu_seqlens int32 (B + 1,), the
    longest sequence, tokens without the unused ones int32 (B,)). Reading the mask waits for a GPU.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    kept = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        kept = attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    return (*_pack(hidden_states, kept, lengths), used)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a batch whose rows hold several sequences each, one after the other.

    attention_mask_in_length: int (B, S): the lengths of a row's sequences, then zeros. Otherwise as
    `unpad_input`, with as many sequences in cu_seqlens as there are lengths.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    places = torch.arange(hidden_states.shape[1], device=attention_mask_in_length.device)
    kept = places < attention_mask_in_length.sum(-1, keepdim=True)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    return _pack(hidden_states, kept, lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens (total, ...) at their places, as `unpad_input` gave them, in a batch (B, S, ...) of zeros."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; it must be (B, S) of hidden_states, "
            f"{tuple(hidden_states.shape[:2])}"
        )


def _pack(hidden_states: Tensor, kept: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest
