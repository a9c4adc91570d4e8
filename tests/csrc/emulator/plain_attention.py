"""Inputs of the attention tests, and attention as eager models write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> list[Tensor]:
    sizes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [torch.randn(size).to(dtype) for size in sizes]


def plain(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """Attention as eager models write it: products and probabilities in the dtype of the inputs."""
    mask, bias, cu_q, cu_k, _, slopes, sinks = rest
    if cu_q is not None:
        parts = []
        for i in range(cu_q.numel() - 1):
            q, (k, v) = query[cu_q[i] : cu_q[i + 1]], (t[cu_k[i] : cu_k[i + 1]] for t in (key, value))
            one = plain(
                *(t.transpose(0, 1)[None] for t in (q, k, v)),
                mask,
                bias,
                None,
                None,
                None,
                slopes,
                sinks,
                **kwargs,
            )
            parts.append(one[0].transpose(0, 1))
        return torch.cat(parts)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = (query @ key.transpose(-1, -2)) * kwargs["softmax_scale"]
    if kwargs["softcap"]:
        logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    rows, keys = logits.shape[-2:]
    i, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    if slopes is not None:
        logits = logits - (slopes.view(-1, query.shape[1], 1, 1) * (i - j).abs()).to(logits.dtype)
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    right = 0 if kwargs["is_causal"] else kwargs["window_right"]
    if right >= 0:
        hidden |= j > i + right
    if kwargs["window_left"] >= 0:
        hidden |= j < i - kwargs["window_left"]
    hidden = hidden.expand_as(logits)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None]
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        extra = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.softmax(torch.cat([logits, extra], -1), -1, dtype=torch.float32)[..., :-1]
    else:
        weights = torch.softmax(logits, -1, dtype=torch.float32).nan_to_num(0)
    return weights.to(value.dtype) @ value
