"""Attention written out with the whole matrix of logits, for any dtype and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.philox import keep_attention


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    softmax_scale: float,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    sequence: int = 0,
    **unused: int,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of `bigmodel::attention`, by its definition; `sequence` numbers the first one."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        outs, sums = [query[:0]], [query.new_empty(query.shape[1], 0)]
        for n in range(cu_seqlens_q.numel() - 1):
            q, k = slice(*cu_seqlens_q[n : n + 2].tolist()), slice(*cu_seqlens_k[n : n + 2].tolist())
            slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
            out, logsumexp = eager_attention(
                *(t.transpose(0, 1)[None] for t in (query[q], key[k], value[k])),
                dropout_seed=dropout_seed, alibi_slopes=slopes, sinks=sinks, softmax_scale=softmax_scale,
                is_causal=is_causal, window_left=window_left, window_right=window_right, softcap=softcap,
                dropout_p=dropout_p, sequence=n,
            )  # fmt: skip
            outs.append(out[0].transpose(0, 1))
            sums.append(logsumexp[0])
        return torch.cat(outs), torch.cat(sums, -1)
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    logits = query @ key.transpose(-1, -2) * softmax_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    i = torch.arange(rows, device=query.device)[:, None] + keys - rows
    j = torch.arange(keys, device=query.device)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(logits.dtype)[..., None, None] * (i - j).abs()
    visible = torch.ones(rows, keys, dtype=torch.bool, device=query.device)
    if is_causal:
        window_right = 0
    if window_left >= 0:
        visible = visible & (j >= i - window_left)
    if window_right >= 0:
        visible = visible & (j <= i + window_right)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None]
    logits = logits.masked_fill(~visible, -torch.inf)
    sink = logits.new_full((*logits.shape[:3], 1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, None, None].expand_as(sink)
    logits = torch.cat([logits, sink], -1)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(blind, 0.0)
    weights = torch.softmax(logits, -1)[..., :keys].masked_fill(blind, 0.0)
    if dropout_seed is not None:
        weights = weights * keep_attention(
            dropout_seed, dropout_p, sequence, heads, slice(0, rows), slice(0, keys), weights
        )
    return weights.to(value.dtype) @ value, torch.logsumexp(logits, -1).masked_fill(blind[..., 0], -torch.inf)
