"""Word, position and token type embeddings, with LayerNorm and dropout, in plain PyTorch: the definition of
right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.activations import dropout
from bigmodel_kernels.ops.norm.reference import norm_gradients, normalize
from bigmodel_kernels.ops.registration import compute_dtype, filled


def _total(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
) -> Tensor:
    """The sum of the rows, in the type of computation."""
    total = F.embedding(input_ids, word_weight).to(compute_dtype(word_weight.dtype))
    if position_ids is not None and position_weight is not None:
        total = total + F.embedding(position_ids, position_weight)
    if token_type_ids is not None and token_type_weight is not None:
        total = total + F.embedding(token_type_ids, token_type_weight)
    return total


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
    """See `bigmodel_kernels.embedding`."""
    y = _total(input_ids, word_weight, position_ids, position_weight, token_type_ids, token_type_weight)
    if norm_weight is not None:
        y = normalize(y, norm_weight, norm_bias, norm_eps)
    return dropout(y, dropout_seed, dropout_p).to(word_weight.dtype)


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
    """Gradients of the tables, norm_weight and norm_bias of `bigmodel_kernels.embedding`."""
    need_word, need_position, need_type, need_norm_weight, need_norm_bias = needs
    dy: Tensor | None = dropout(grad.to(compute_dtype(word_weight.dtype)), dropout_seed, dropout_p)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None and dy is not None:
        y = _total(input_ids, word_weight, position_ids, position_weight, token_type_ids, token_type_weight)
        wanted = (need_word or need_position or need_type, need_norm_weight, need_norm_bias)
        dy, dnorm_weight, dnorm_bias = norm_gradients(dy, y, norm_weight, norm_bias, norm_eps, wanted)
    results = (
        _table_gradient(dy, input_ids, word_weight, padding_idx) if need_word else None,
        _table_gradient(dy, position_ids, position_weight) if need_position else None,
        _table_gradient(dy, token_type_ids, token_type_weight) if need_type else None,
        dnorm_weight,
        dnorm_bias,
    )
    return filled(results, needs, word_weight)


def _table_gradient(
    grad: Tensor | None, ids: Tensor | None, weight: Tensor | None, padding_idx: int = -1
) -> Tensor | None:
    """Rows of grad added up by id, in the type of computation; broadcast ids get the sum of what they were
    given to."""
    if grad is None or ids is None or weight is None:
        return None
    grad = grad.sum_to_size((*ids.shape, grad.shape[-1]))
    return torch.ops.aten.embedding_dense_backward.default(
        grad.contiguous(), ids, weight.shape[0], padding_idx, False
    )
