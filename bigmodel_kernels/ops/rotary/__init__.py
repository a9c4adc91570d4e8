"""Rotary position embedding of queries and keys: `bigmodel::rotary` and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.attention.vmap import fold
from bigmodel_kernels.ops.registration import (
    backward_formula,
    call,
    define,
    public,
    register_gradient,
    require_device,
    require_float,
    require_like,
    shape,
)


@public
def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Query and key with pairs of their elements turned by the angles of their positions.

    The first R elements of a head are R / 2 pairs (a, b), which become (a cos - b sin, b cos + a sin); the
    others pass. Pair n is elements n and n + R / 2 (GPT-NeoX, Llama), or 2 n and 2 n + 1 where `interleaved`
    (GPT-J).

    Args:
      query, key: (B, H, S, D) and (B, Hkv, S, D), D even or odd, any strides with a contiguous last
        dimension (if not, it is copied). Packed sequences (total, H, D) are one of length total:
        query.transpose(0, 1)[None].
      cos, sin: (B, S, R / 2), or (1, S, R / 2) or (S, R / 2) for all of the batch: of the angle of each
        position and pair. As models of transformers make them, (B or 1, S, R) with every number twice, they
        are taken too. In the dtype of query or float32. They get no gradient.
      rotary_dim: R, even, at most D. Where it is None, R is D, and cos must hold D / 2 or D numbers a
        position.

    Returns both, in new memory laid out as (B, S, H, D), as `attention` lays out its result.

    dtypes float32, bfloat16 and float16 (float64 in the reference), the same for query and key; computed in
    float32 and rounded once. Autocast leaves them alone. Differentiable any number of times in query and key:
    the gradient is a turn by the negative angles.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: RoFormer (Su et al., 2021, arXiv:2104.09864).
    """
    args, kwargs = prepare(query, key, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved)
    return call("rotary", *args, **kwargs)  # type: ignore[no-any-return]


def prepare(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    if rotary_dim is not None and (rotary_dim < 2 or rotary_dim % 2):
        raise ValueError(f"rotary_dim={rotary_dim} is out of range; allowed are even numbers from 2 to D")
    if rotary_dim is None:
        rotary_dim = query.shape[-1] if query.dim() else 0
    angles = []
    for name, table in (("cos", cos), ("sin", sin)):
        size = table.shape[-1] if table.dim() else 0
        if size not in (rotary_dim, rotary_dim // 2) or rotary_dim % 2:
            raise ValueError(
                f"{name} has shape {shape(table)}; its last dimension must be R / 2 or R, with an even R = "
                f"rotary_dim, which is {rotary_dim}"
            )
        if size == rotary_dim:
            table = table[..., ::2] if interleaved else table[..., : size // 2]
        angles.append(table[None] if table.dim() == 2 else table)
    return (query, key, *angles), {"interleaved": interleaved}


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> None:
    require_float("query", query)
    require_like("key", key, "query", query)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {shape(tensor)}; it must have 4 dimensions, (B, H, S, D)")
    batch, _, rows, dim = query.shape
    if key.shape[0] != batch or key.shape[2] != rows or key.shape[3] != dim:
        raise ValueError(f"key has shape {shape(key)}; it must be ({batch}, Hkv, {rows}, {dim}), as query")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != query.dtype and table.dtype != torch.float32:
            raise TypeError(
                f"{name} has dtype {table.dtype}; allowed are that of query, {query.dtype}, and torch.float32"
            )
        if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1] != rows:
            raise ValueError(
                f"{name} has shape {shape(table)}; it must be (B, S, R / 2) or (1, S, R / 2), "
                f"({batch}, {rows}, R / 2) or (1, {rows}, R / 2)"
            )
        if not 0 < 2 * table.shape[2] <= dim:
            raise ValueError(
                f"{name} has {table.shape[2]} angles a position; allowed are 1 to D / 2, {dim // 2}"
            )
        require_device(name, table, "query", query)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"sin has shape {shape(sin)} and dtype {sin.dtype}; it must have those of cos, {shape(cos)} and "
            f"{cos.dtype}"
        )


def _run(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    _check(query, key, cos, sin)
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    args = (query, key, cos.contiguous(), sin.contiguous())
    return backends.run("rotary", query.device.type, args, {"interleaved": interleaved})  # type: ignore[no-any-return]


def _fake(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    _check(query, key, cos, sin)
    return _empty(query), _empty(key)


def _empty(x: Tensor) -> Tensor:
    batch, heads, rows, dim = x.shape
    return x.new_empty((batch, rows, heads, dim)).transpose(1, 2)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    query, key, cos, sin = inputs
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad:
            raise ValueError(f"{name} requires grad, and has no gradient; pass {name}.detach()")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.options = keyword_only_inputs
    ctx.like = [(t.shape, t.dtype) for t in (query, key)]


@backward_formula(4)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    cos, sin = saved
    dquery, dkey = (
        cos.new_zeros(size, dtype=dtype) if grad is None else grad
        for grad, (size, dtype) in zip(grads, ctx.like, strict=True)
    )
    turned = torch.ops.bigmodel.rotary.default(dquery, dkey, cos, -sin, **ctx.options)
    wanted = [
        result if need and grad is not None else None
        for result, need, grad in zip(turned, needs, grads, strict=False)
    ]
    return (*wanted, None, None)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Tensor, **options: Any) -> tuple[Any, Any]:
    """A map of a batch is a larger batch."""
    size, at, dim = info.batch_size, args[0].shape, in_dims[0]
    batch = at[0] if dim is None or dim > 0 else at[1]
    folded: list[Any] = [
        fold(a, d, rank, size, batch) for a, d, rank in zip(args, in_dims, (4, 4, 3, 3), strict=True)
    ]
    # What the map and the batch share stays one; cos and sin are shared together or not at all.
    if folded[2].shape != folded[3].shape:
        folded[2:] = [t.expand(size * batch, *t.shape[1:]) for t in folded[2:]]
    results = torch.ops.bigmodel.rotary.default(*folded, **options)
    return tuple(r.unflatten(0, (size, batch)) for r in results), (0, 0)


define(
    "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, *, bool interleaved=False) -> (Tensor, Tensor)",
    _run,
    _fake,
)
register_gradient("rotary", _backward, _setup_context)
torch.library.register_vmap("bigmodel::rotary", _vmap)
