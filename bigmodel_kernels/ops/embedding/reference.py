"""Sum of word, position and token type embeddings, with LayerNorm, in plain PyTorch: the definition of
right."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.norm.reference import normalize
from bigmodel_kernels.ops.registration import compute_dtype


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
    """See `bigmodel_kernels.embedding`."""
    total = F.embedding(input_ids, word_weight).to(compute_dtype(word_weight.dtype))
    if position_ids is not None and position_weight is not None:
        total = total + F.embedding(position_ids, position_weight)
    if token_type_ids is not None and token_type_weight is not None:
        total = total + F.embedding(token_type_ids, token_type_weight)
    if norm_weight is not None:
        total = normalize(total, norm_weight, norm_bias, norm_eps)
    return total.to(word_weight.dtype)
