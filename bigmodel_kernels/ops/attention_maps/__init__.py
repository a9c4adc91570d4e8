"""What attention looks at: `bigmodel::attention_statistics` and `bigmodel::attention_probabilities`.

Both take the arguments of `bigmodel::attention` without value and dropout, and see exactly the keys that it
sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops import attention as plain
from bigmodel_kernels.ops.attention.checks import check, check_values
from bigmodel_kernels.ops.registration import (
    call,
    compute_dtype,
    define,
    map_elements,
    public,
    register_gradient,
    require_device,
    shape,
)


class AttentionStatistics(NamedTuple):
    """Statistics of the probabilities of each head; see `attention_statistics` for the shapes."""

    entropy: Tensor
    mass: Tensor
    top_keys: Tensor
    top_probabilities: Tensor


@public
def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    top_k: int = 0,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> AttentionStatistics:
    """Entropy, most looked-at keys and mass of the probabilities of `attention`, tile by tile: no Sq x Sk
    tensor is made.

    Args:
      query, key: (B, H, Sq, D) and (B, Hkv, Sk, D), or packed (total_q, H, D) and (total_k, Hkv, D) with
        cu_seqlens, as in `attention`.
      top_k: how many keys to name for each query; 0 for none.
      query_padding_mask: bool (B, Sq), True counts: the others get zeros, and give no mass. Dense form only.
      The rest: as in `attention`.

    Returns a named tuple. float32 (float64 for float64), keys int64:
      entropy: (B, H, Sq), or packed (H, total_q): -sum(p log p) in nats, over the keys and, where there are
        sinks, the sink. At most the log of the number of visible keys (one more with a sink).
      mass: (B, H, Sk), or packed (H, total_k): what each key gets from all queries together. Without sinks,
        the sum over keys is the number of queries that see a key.
      top_keys, top_probabilities: (B, H, Sq, top_k), or packed (H, total_q, top_k), largest first; a packed
        key is counted from the start of its sequence. Where no key with a probability above 0 is left, the
        key is -1 and the probability 0. Which of equal ones comes first is not defined.
    A query that sees no key has entropy 0 and gives nothing.

    dtypes float32, bfloat16, float16 and float64, the same for query and key; autocast leaves them alone. The
    softmax is in float32 (float64 for float64). There is no gradient: a backward through a result raises
    NotImplementedError; pass detached tensors where the results are kept.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: entropy and mass of heads as in Clark et al., 2019, arXiv:1906.04341.
    """
    args, options = prepare(
        query,
        key,
        top_k=top_k,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        window=window,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        bias=bias,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    return AttentionStatistics(*call("attention_statistics", *args, **options))


@public
def attention_probabilities(
    query: Tensor,
    key: Tensor,
    *,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The probabilities that `attention` weighs the values with: all, or those of some heads and queries.

    Args:
      query, key: (B, H, Sq, D) and (B, Hkv, Sk, D), or packed (total_q, H, D) and (total_k, Hkv, D) with
        cu_seqlens, as in `attention`.
      heads, queries: indices of those to return, in this order, -1 for the last; None for all. A packed query
        is counted from the start of the first sequence.
      query_padding_mask: bool (B, Sq), True counts: the others get zeros. Dense form only.
      The rest: as in `attention`.

    Returns (B, heads, queries, Sk) in the dtype of query, or packed (heads, queries, max_seqlen_k), where a
    row has the keys of its own sequence and then zeros. The only tensor of that size is the result. A row
    sums to 1 but for rounding (with sinks to less), and is zero for a query that sees no key.

    dtypes, autocast, gradient and errors: as in `attention_statistics`.

    Source: Vaswani et al., 2017, arXiv:1706.03762.
    """
    args, options = prepare_probabilities(
        query,
        key,
        heads=heads,
        queries=queries,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        window=window,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        bias=bias,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    return call("attention_probabilities", *args, **options)  # type: ignore[no-any-return]


def prepare(
    query: Tensor, key: Tensor, *, top_k: int = 0, query_padding_mask: Tensor | None = None, **options: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `bigmodel::attention_statistics` for those of the public function."""
    args, raw = _prepare(query, key, query_padding_mask, options)
    return args, {**raw, "top_k": top_k}


def prepare_probabilities(
    query: Tensor,
    key: Tensor,
    *,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    query_padding_mask: Tensor | None = None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `bigmodel::attention_probabilities` for those of the public function."""
    args, raw = _prepare(query, key, query_padding_mask, options)
    chosen = {
        name: None if values is None else [int(value) for value in values]
        for name, values in (("heads", heads), ("queries", queries))
    }
    return args, {**raw, **chosen}


def _prepare(
    query: Tensor, key: Tensor, query_padding_mask: Tensor | None, options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Those of attention, whose value and dropout are not there."""
    inputs, raw = plain.prepare(query, key, key, **options)
    _, _, _, padding, bias, cu_seqlens_q, cu_seqlens_k, _, slopes, sinks = inputs
    del raw["dropout_p"]
    return (query, key, padding, query_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, slopes, sinks), raw


# ------------------------------------------------------------------------------------------------------------
# checks


def _check(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> None:
    """What attention requires of these arguments, and the mask of queries."""
    head_terms = (None, alibi_slopes, sinks)
    check(query, key, key, key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, *head_terms, **options)
    if query_padding_mask is None:
        return
    if query_padding_mask.dtype != torch.bool:
        raise TypeError(
            f"query_padding_mask has dtype {query_padding_mask.dtype}; it must be bool, True for counted"
        )
    if cu_seqlens_q is not None:
        raise ValueError(
            f"query_padding_mask has shape {shape(query_padding_mask)} with cu_seqlens; it must be None for "
            "packed sequences"
        )
    size = (query.shape[0], query.shape[2])
    if tuple(query_padding_mask.shape) != size:
        raise ValueError(
            f"query_padding_mask has shape {shape(query_padding_mask)}; it must be (B, Sq), {size}"
        )
    require_device("query_padding_mask", query_padding_mask, "query", query)


def _check_values(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The numbers in cu_seqlens."""
    query, key, *rest = args
    cu_seqlens = (*rest[3:5], None, None)[:2]
    check_values((query, key, None, None, None, *cu_seqlens), options)


def _check_top_k(top_k: int) -> None:
    if top_k < 0:
        raise ValueError(f"top_k={top_k} is negative; allowed are 0 (none) and positive numbers")


def _check_chosen(name: str, chosen: Sequence[int] | None, size: Any) -> None:
    for index in chosen or ():
        if not -size <= index < size:
            raise ValueError(f"{name} has {index}; allowed are {-size} to {size - 1}")


# ------------------------------------------------------------------------------------------------------------
# operators


def _run_statistics(*args: Any, top_k: int = 0, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_top_k(top_k)
    _check(*args, **options)
    _check_values(args, options)
    return backends.run("attention_statistics", args[0].device.type, args, {**options, "top_k": top_k})  # type: ignore[no-any-return]


def _fake_statistics(
    query: Tensor, key: Tensor, *args: Any, top_k: int = 0, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_top_k(top_k)
    _check(query, key, *args, **options)
    if query.dim() == 3:
        rows: tuple[Any, ...] = (query.shape[1], query.shape[0])
        keys: tuple[Any, ...] = (query.shape[1], key.shape[0])
    else:
        rows, keys = tuple(query.shape[:3]), (*query.shape[:2], key.shape[2])
    dtype = compute_dtype(query.dtype)
    return (
        query.new_empty(rows, dtype=dtype),
        query.new_empty(keys, dtype=dtype),
        query.new_empty((*rows, top_k), dtype=torch.int64),
        query.new_empty((*rows, top_k), dtype=dtype),
    )


def _check_probabilities(
    args: tuple[Any, ...],
    heads: Sequence[int] | None,
    queries: Sequence[int] | None,
    options: dict[str, Any],
) -> None:
    _check(*args, **options)
    query = args[0]
    _check_chosen("heads", heads, query.shape[1])
    _check_chosen("queries", queries, query.shape[0] if query.dim() == 3 else query.shape[2])


def _run_probabilities(
    *args: Any, heads: Sequence[int] | None = None, queries: Sequence[int] | None = None, **options: Any
) -> Tensor:
    _check_probabilities(args, heads, queries, options)
    _check_values(args, options)
    options = {**options, "heads": heads, "queries": queries}
    if heads is not None and not heads:  # nothing to compute, by kernels that have one head at least
        return _fake_probabilities(*args, **options)
    return backends.run("attention_probabilities", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_probabilities(
    query: Tensor,
    key: Tensor,
    *args: Any,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    _check_probabilities((query, key, *args), heads, queries, options)
    packed = query.dim() == 3
    rows = query.shape[0] if packed else query.shape[2]
    size = (
        query.shape[1] if heads is None else len(heads),
        rows if queries is None else len(queries),
        options.get("max_seqlen_k", 0) if packed else key.shape[2],
    )
    return query.new_empty(size if packed else (query.shape[0], *size))


def _no_gradient(name: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"bigmodel::{name} has no gradient: it is there to look at attention. Pass query.detach() and "
            "key.detach(), or write the softmax in torch to train on it"
        )

    return backward


def _vmap(name: str) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any) -> tuple[Any, Any]:
        return map_elements(
            getattr(torch.ops.bigmodel, name).default, info.batch_size, in_dims, args, options
        )

    return rule


_INPUTS = (
    "Tensor query, Tensor key, Tensor? key_padding_mask=None, Tensor? query_padding_mask=None, "
    "Tensor? bias=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None"
)
_OPTIONS = (
    "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, float softmax_scale, bool is_causal=False, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0"
)
define(
    f"attention_statistics({_INPUTS}, *, {_OPTIONS}, SymInt top_k=0) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_statistics,
    _fake_statistics,
)
define(
    f"attention_probabilities({_INPUTS}, *, {_OPTIONS}, int[]? heads=None, int[]? queries=None) -> Tensor",
    _run_probabilities,
    _fake_probabilities,
)
for _name in ("attention_statistics", "attention_probabilities"):
    register_gradient(_name, _no_gradient(_name))
    torch.library.register_vmap(f"bigmodel::{_name}", _vmap(_name))
