"""Calls of the compiled attention and the same in plain PyTorch, which knows nothing of tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.philox import keep_attention

native = torch.ops.bigmodel


@dataclass(frozen=True)
class Shape:
    """Sizes and features of one call. `lengths` (pairs of queries and keys) makes it a packed one."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    queries: int = 17
    keys: int = 17
    dim: int = 32
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    padding: bool = False
    bias: tuple[int, ...] | None = None  # its shape
    alibi: int = 0  # 1: a slope for each head, 2: for each head of each sequence
    sinks: bool = False
    dropout: float = 0.0
    lengths: tuple[tuple[int, int], ...] | None = None
    strided: bool = False  # query, key and value are parts of one projection

    @property
    def softmax_scale(self) -> float:
        return self.dim**-0.5 if self.scale is None else self.scale


NAMES = ("query", "key", "value", "bias", "sinks")


@dataclass
class Call:
    shape: Shape
    tensors: dict[str, Tensor]  # the differentiable ones
    mask: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor


def make(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    b, h, hkv, d = shape.batch, shape.heads, shape.kv_heads, shape.dim
    cu_q = cu_k = None
    if shape.lengths is not None:
        q, k = (torch.tensor([0, *(pair[i] for pair in shape.lengths)]).cumsum(0) for i in (0, 1))
        cu_q, cu_k = q.to(torch.int32), k.to(torch.int32)
        total_q, total_k = int(q[-1]), int(k[-1])
        query, key, value = normal(total_q, h, d), normal(total_k, hkv, d), normal(total_k, hkv, d)
        grad_out, grad_lse = normal(total_q, h, d), normal(h, total_q, dtype=torch.float32)
    else:
        if shape.strided and shape.queries == shape.keys:
            fused = normal(b, shape.queries, (h + 2 * hkv) * d + 3)
            query, key, value = (
                fused[..., start * d : (start + n) * d].unflatten(-1, (n, d)).transpose(1, 2)
                for start, n in ((0, h), (h, hkv), (h + hkv, hkv))
            )
        else:
            query = normal(b, shape.queries, h, d).transpose(1, 2)
            key, value = normal(b, hkv, shape.keys, d), normal(b, hkv, shape.keys, d)
        grad_out = normal(b, shape.queries, h, d).transpose(1, 2)
        grad_lse = normal(b, h, shape.queries, dtype=torch.float32)
    tensors = {"query": query, "key": key, "value": value}
    if shape.bias is not None:
        tensors["bias"] = normal(*shape.bias)
    if shape.sinks:
        tensors["sinks"] = normal(h, dtype=torch.float32)
    mask = None
    if shape.padding:  # holes, and of the last sequence nothing at all
        mask = torch.rand(b, shape.keys, generator=generator) > 0.3
        mask[-1] = b == 1
    sequences = b if shape.lengths is None else len(shape.lengths)
    slopes = None
    if shape.alibi:
        slopes = torch.rand(*((sequences, h) if shape.alibi == 2 else (h,)), generator=generator)
    dropout_seed = torch.tensor(0x1234_5678_9ABC_DEF) if shape.dropout else None
    return Call(shape, tensors, mask, slopes, dropout_seed, cu_q, cu_k, grad_out, grad_lse)


def arguments(call: Call) -> tuple[Any, ...]:
    """What follows query, key and value in the compiled operators."""
    s, t = call.shape, call.tensors
    longest = (
        (0, 0)
        if s.lengths is None
        else (max((q for q, _ in s.lengths), default=0), max((k for _, k in s.lengths), default=0))
    )
    return (
        call.mask, t.get("bias"), call.cu_q, call.cu_k, call.seed, call.slopes, t.get("sinks"),
        *longest, s.softmax_scale, s.causal, *s.window, s.softcap, s.dropout,
    )  # fmt: skip


def forward(call: Call) -> tuple[Tensor, Tensor]:
    t = call.tensors
    return native.cpu_attention(t["query"], t["key"], t["value"], *arguments(call))


def plain(call: Call, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The definition, on `tensors` in whatever dtype they are."""
    s = call.shape
    if s.lengths is None:
        return _plain(call, tensors, 0, call.mask)
    outs, sums = [], []
    for n in range(len(s.lengths)):
        assert call.cu_q is not None and call.cu_k is not None
        q, k = slice(*call.cu_q[n : n + 2].tolist()), slice(*call.cu_k[n : n + 2].tolist())
        part = {name: tensors[name][q if name == "query" else k].transpose(0, 1)[None] for name in NAMES[:3]}
        out, lse = _plain(call, {**tensors, **part}, n, None)
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, -1)


def _plain(call: Call, t: dict[str, Tensor], sequence: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    s = call.shape
    query, key, value = (t[name] for name in NAMES[:3])
    dtype = query.dtype
    group = s.heads // s.kv_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(-1, -2) * s.softmax_scale
    if s.softcap:
        logits = s.softcap * torch.tanh(logits / s.softcap)
    if "bias" in t:
        logits = logits + t["bias"].to(dtype)
    nq, nk = query.shape[2], key.shape[2]
    i, j = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)
    if call.slopes is not None:
        slopes = call.slopes if call.slopes.dim() == 1 else call.slopes[sequence : sequence + query.shape[0]]
        logits = logits - (slopes[..., None, None] * (i - j).abs()).to(dtype)
    visible = torch.ones(nq, nk, dtype=torch.bool)
    left, right = s.window
    if s.causal or right >= 0:
        visible &= j <= i + (0 if s.causal else right)
    if left >= 0:
        visible &= j >= i - left
    visible = visible.expand(logits.shape) if mask is None else visible & mask[:, None, None]
    logits = logits.masked_fill(~visible, -math.inf)
    if "sinks" in t:
        sink = t["sinks"].to(dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    # A row with nothing visible has the logsumexp -inf and the result 0, and no gradient flows into it.
    empty = (logits == -math.inf).all(-1, keepdim=True)
    safe = logits.masked_fill(empty, 0.0)
    lse = safe.logsumexp(-1, keepdim=True)
    p = (safe.softmax(-1) * ~empty)[..., :nk]
    if call.seed is not None:
        like = torch.empty(p.shape, dtype=dtype)
        p = p * keep_attention(call.seed, s.dropout, sequence, s.heads, slice(0, nq), slice(0, nk), like)
    return p @ value, lse.masked_fill(empty, -math.inf).squeeze(-1)
