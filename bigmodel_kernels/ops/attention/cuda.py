"""Attention by the compiled CUDA library: Hopper's kernel there, elsewhere the one for sm_80 and later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention.native import bias_gradient
from bigmodel_kernels.ops.cuda_library import counters, lacking, readable, unmeasured


def supports(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return _lacking(query=query, key=key, value=value)


def only_when_forced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    **options: Any,
) -> str | None:
    """Why the library does not run the call unasked, or None."""
    alibi_slopes = args[3] if len(args) > 3 else None
    general = softcap or dropout_p or any(t is not None for t in (key_padding_mask, bias, alibi_slopes))
    if general:
        return "with softcap, key padding, bias, ALiBi or dropout Triton's kernels were measured to be faster"
    return unmeasured(query)


def only_when_forced_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *args: Any,
    **options: Any,
) -> str | None:
    """Why the library does not run the call unasked, or None."""
    return only_when_forced(query, key, value, *args, **options)


only_when_forced_decode = unmeasured


def _lacking(**tensors: Tensor) -> str | None:
    """What the library's kernels have no code for."""
    query = tensors["query"]
    if reason := lacking(query):
        return reason
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"head_dim {query.shape[-1]} is not a multiple of 8 up to 256"
    for name, tensor in tensors.items():
        if not readable(tensor):
            return f"{name} does not lie in pieces of 16 bytes: strides {tensor.stride()}"
    return None


def run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.attention`; the library's operator takes the same arguments."""
    out, logsumexp = torch.ops.bigmodel.cuda_attention.default(*args, **options)
    return out, logsumexp


def supports_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return supports(query, key, value)


def run_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    bias_requires_grad: bool = False,
    sinks_require_grad: bool = False,
    deterministic: bool = False,
    side_by_side: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `bigmodel::attention_backward`. Unless `deterministic`, the order varies in which the gradient of a
    broadcast bias, and on Hopper that of query, is added up."""
    sinks = args[4] if len(args) > 4 else None
    dq, dk, dv, wide, delta = torch.ops.bigmodel.cuda_attention_backward.default(
        grad_out if readable(grad_out) else grad_out.contiguous(),
        None if grad_logsumexp is None else grad_logsumexp.contiguous(),
        *(query, key, value, out, logsumexp.contiguous(), key_padding_mask, bias, *args),
        **options,
        bias_requires_grad=bias_requires_grad,
        deterministic=deterministic,
        side_by_side=side_by_side,
    )
    dbias, dsinks = query.new_empty(0), query.new_empty(0)
    if bias is not None and bias_requires_grad:
        dbias = bias_gradient(wide, bias)
    if sinks is not None and sinks_require_grad:
        rows = (1,) if delta.dim() == 2 else (0, 2)
        dsinks = -(torch.exp(sinks.float().view(-1, 1) - logsumexp) * delta).sum(rows).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def supports_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *args: Any, **options: Any
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return _lacking(query=query, key_cache=key_cache, value_cache=value_cache)


_ROWS = 16  # of a tile: new tokens times the query heads of one key head


def run_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.attention_decode`."""
    batch, heads, rows, _ = query.shape
    kv_heads = key_cache.shape[1]
    tiles = batch * kv_heads * -(-heads // kv_heads * rows // _ROWS)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    out, logsumexp = torch.ops.bigmodel.cuda_attention_decode.default(
        *(query, key_cache, value_cache, cache_seqlens, counters(query.device, tiles)),
        *(block_table, alibi_slopes, sinks),
        **options,
    )
    return out, logsumexp
