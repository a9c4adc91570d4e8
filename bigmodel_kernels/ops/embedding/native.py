"""Embedding by the compiled CPU library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.native_library import contiguous, lacking


def supports(input_ids: Tensor, word_weight: Tensor, *args: object, **options: object) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_embedding_backward", word_weight.dtype)


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
    return torch.ops.bigmodel.cpu_embedding(
        _full(input_ids, input_ids),
        word_weight.contiguous(),
        _full(position_ids, input_ids),
        contiguous(position_weight),
        _full(token_type_ids, input_ids),
        contiguous(token_type_weight),
        contiguous(norm_weight),
        contiguous(norm_bias),
        norm_eps,
        dropout_seed if dropout_p else None,
        dropout_p=dropout_p,
    )


def supports_backward(grad: Tensor, *args: object, **options: object) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_embedding_backward", grad.dtype)


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
    **options: Any,
) -> list[Tensor]:
    """Gradients of the tables, norm_weight and norm_bias."""
    return torch.ops.bigmodel.cpu_embedding_backward(  # type: ignore[no-any-return]
        grad.contiguous(),
        _full(input_ids, input_ids),
        word_weight.contiguous(),
        _full(position_ids, input_ids),
        contiguous(position_weight),
        _full(token_type_ids, input_ids),
        contiguous(token_type_weight),
        contiguous(norm_weight),
        contiguous(norm_bias),
        dropout_seed,
        **options,
    )


def _full(ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Ids as the library reads them: int64, one for each input id, without strides."""
    return None if ids is None else ids.to(torch.int64).expand(input_ids.shape).contiguous()
