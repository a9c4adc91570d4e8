"""Attention under torch.vmap: a dense call is a batch already, so a map of it is one call of a larger batch.

Calls whose parts cannot lie in one batch run one after the other: packed ones, whose sequences have no
common length; ones with dropout, whose elements are told apart by their place in the batch; ones with sinks
of their own, which a batch shares; and the backward with a gradient of bias or sinks, which sums over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.registration import map_elements

#: Dimensions of the optional arguments, from key_padding_mask to sinks, with a batch: broadcast ones are
#: completed to them. 0 has no batch.
_OPTIONAL_RANKS = (2, 4, 0, 0, 0, 2, 0)
_FORWARD_RANKS = (4, 4, 4, *_OPTIONAL_RANKS)
_BACKWARD_RANKS = (4, 3, 4, 4, 4, 4, 3, *_OPTIONAL_RANKS)


def forward(info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any) -> tuple[Any, Any]:
    return _run(torch.ops.bigmodel.attention.default, info.batch_size, in_dims, args, options, _FORWARD_RANKS)


def backward(info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any) -> tuple[Any, Any]:
    op = torch.ops.bigmodel.attention_backward.default
    return _run(op, info.batch_size, in_dims, args, options, _BACKWARD_RANKS)


def _run(
    op: Any,
    size: int,
    in_dims: tuple[Any, ...],
    args: tuple[Any, ...],
    options: dict[str, Any],
    ranks: tuple[int, ...],
) -> tuple[Any, Any]:
    missing = len(ranks) - len(args)  # the dispatcher leaves out trailing defaults
    args, in_dims = (*args, *(None,) * missing), (*in_dims, *(None,) * missing)
    if not _foldable(args[-7:], in_dims[-7:], options):
        return map_elements(op, size, in_dims, args, options)
    shape, dim = args[0].shape, in_dims[0]
    batch = shape[0] if dim is None or dim > 0 else shape[1]
    folded = (fold(a, d, rank, size, batch) for a, d, rank in zip(args, in_dims, ranks, strict=True))
    results = op(*folded, **options)
    # Gradients that are not wanted are empty and have no batch.
    outputs = tuple(r.unflatten(0, (size, batch)) if r.dim() > 1 else r for r in results)
    return outputs, tuple(0 if r.dim() > 1 else None for r in results)


def _foldable(optional: tuple[Any, ...], in_dims: tuple[Any, ...], options: dict[str, Any]) -> bool:
    _, _, cu_seqlens_q, _, seed, _, _ = optional
    return (
        cu_seqlens_q is None
        and seed is None
        and in_dims[-1] is None
        and not options.get("bias_requires_grad")
        and not options.get("sinks_require_grad")
    )


def fold(tensor: Tensor | None, dim: int | None, rank: int, size: int, batch: int) -> Tensor | None:
    """The mapped dimension and the batch as one: (size * batch, ...)."""
    if tensor is None or rank == 0:
        return tensor
    if dim is None:
        if tensor.dim() < rank or tensor.shape[0] == 1 != batch:
            return tensor  # the whole batch shares it
        tensor = tensor.expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    missing = rank + 1 - tensor.dim()
    tensor = tensor.reshape(size, *(1,) * missing, *tensor.shape[1:])
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)
