"""Attention on tensors that are spread over devices: how it and its gradient may be sharded.

DTensor asks for every operator which placements of inputs give which placements of outputs. Attention treats
every sequence and every head alone, so a mesh dimension may split the batch, or the heads where both the
query's and the key's divide evenly. What is shared by all sequences (a bias that broadcasts, sinks, slopes)
is replicated, and its gradient is then a sum over the mesh. With dropout only replication is offered: what is
dropped depends on the number of the sequence and of the head, which a shard counts from its own first.

The other operators have no rules: their gradients come as one list, for which DTensor's registration has no
placements. In a patched model they never see DTensors: tensor parallel projections are called as modules.

Source: the registration interface torch.distributed.tensor.experimental.register_sharding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Placements = list[Any]


def ensure_sharding_rules(tensor: Tensor) -> None:
    """Registers the rules when the first DTensor comes by; anything else costs a comparison of types."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) and type(tensor).__name__ == "DTensor":
        register_sharding_rules()


@functools.cache
def register_sharding_rules() -> None:
    """Makes DTensor know attention and its gradient. Calling it again changes nothing.

    Raises ImportError where torch is built without torch.distributed.
    """
    from torch.distributed.tensor.experimental import register_sharding

    import bigmodel_kernels.ops.attention  # noqa: F401  (defines the operators)

    register_sharding(torch.ops.bigmodel.attention.default)(_attention)
    register_sharding(torch.ops.bigmodel.attention_backward.default)(_attention_backward)


def _attention(
    query: Any, key: Any, value: Any, *optional: Any, **options: Any
) -> Sequence[tuple[Placements, Placements]]:
    return [
        ([p["row"], p["row"]], [p["row"], p["row"], p["row"], *(p[i] for i in range(7))])
        for p in _ways(query, key, optional, options)
    ]


def _attention_backward(
    grad_out: Any,
    grad_logsumexp: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    *optional: Any,
    **options: Any,
) -> Sequence[tuple[Placements, Placements]]:
    from torch.distributed.tensor import Partial, Replicate

    bias_wanted = options.get("bias_requires_grad", False)
    sinks_wanted = options.get("sinks_require_grad", False)
    result = []
    for p in _ways(query, key, optional, options):
        row = p["row"]

        def shared(placement: Any, wanted: bool, row: Any = row) -> Any:
            """Placement of a gradient: of what all shards share, each makes its part of a sum."""
            if not wanted:
                return Replicate()  # empty
            return Partial() if placement == Replicate() and row != Replicate() else placement

        outputs = [row, row, row, shared(p[1], bias_wanted), shared(p[6], sinks_wanted)]
        inputs = [row, None if grad_logsumexp is None else row, *[row] * 5, *(p[i] for i in range(7))]
        result.append((outputs, inputs))
    return result


def _ways(query: Any, key: Any, optional: tuple[Any, ...], options: dict[str, Any]) -> list[dict[Any, Any]]:
    """Placements on one mesh dimension: "row" of everything that has (batch, head, ...), and those of the
    seven optional tensors by number: padding mask, bias, two cu_seqlens, seed, ALiBi slopes, sinks.
    """
    from torch.distributed.tensor import Replicate, Shard

    tensors = (*optional, *(None,) * (7 - len(optional)))
    bias, packed, slopes = tensors[1], tensors[2] is not None, tensors[5]
    whole: dict[Any, Any] = {
        "row": Replicate(),
        **{i: None if t is None else Replicate() for i, t in enumerate(tensors)},
    }
    if packed or options.get("dropout_p", 0.0) > 0:
        return [whole]
    batch, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    ways = [whole]
    if batch > 1:
        way = {**whole, "row": Shard(0)}
        if tensors[0] is not None:
            way[0] = Shard(0)
        if bias is not None and len(bias.shape) == 4 and bias.shape[0] == batch:
            way[1] = Shard(0)
        if slopes is not None and len(slopes.shape) == 2:
            way[5] = Shard(0)
        ways.append(way)
    if all(heads % size == 0 and key_heads % size == 0 for size in query.mesh.shape):
        way = {**whole, "row": Shard(1)}
        if bias is not None and len(bias.shape) >= 3 and bias.shape[-3] == heads and heads > 1:
            way[1] = Shard(len(bias.shape) - 3)
        if slopes is not None:
            way[5] = Shard(len(slopes.shape) - 1)
        if tensors[6] is not None:
            way[6] = Shard(0)
        ways.append(way)
    return ways
