"""What is wrong with the arguments of attention, said before any kernel runs."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.registration import (
    broadcasts,
    require_device,
    require_dropout,
    require_float,
    require_like,
    shape,
)


def check(
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
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    softmax_scale: float,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> None:
    """Everything that shapes, dtypes and devices tell; also for fake tensors."""
    require_float("query", query)
    require_like("key", key, "query", query)
    require_like("value", value, "query", query)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    rank = 3 if packed else 4
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != rank:
            form = "(total, H, D) with cu_seqlens" if packed else "(B, H, S, D) without cu_seqlens"
            raise ValueError(f"{name} has shape {shape(tensor)}; it must have {rank} dimensions, {form}")
    dim = query.shape[-1]
    if not 1 <= dim <= 256:
        raise ValueError(f"query has head_dim {dim}; allowed are 1 to 256")
    if key.shape != value.shape:
        raise ValueError(f"value has shape {shape(value)}; it must be that of key, {shape(key)}")
    if key.shape[-1] != dim:
        raise ValueError(f"key has head_dim {key.shape[-1]}; it must be that of query, {dim}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key has {kv_heads} heads; they must divide the {heads} heads of query")
    check_numbers(softmax_scale, window_left, window_right, softcap)
    require_dropout(dropout_p, dropout_seed, "query", query)
    sequences = query.shape[0]
    if packed and cu_seqlens_q is not None and cu_seqlens_q.dim() == 1:
        sequences = cu_seqlens_q.shape[0] - 1
    check_head_terms(query, heads, sequences, alibi_slopes, sinks)
    if packed:
        _check_packed(query, key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if key.shape[0] != batch:
        raise ValueError(f"key has batch {key.shape[0]}; it must be that of query, {batch}")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(
                f"key_padding_mask has dtype {key_padding_mask.dtype}; it must be bool, True for visible"
            )
        if (
            key_padding_mask.dim() != 2
            or key_padding_mask.shape[0] != batch
            or key_padding_mask.shape[1] != keys
        ):
            raise ValueError(
                f"key_padding_mask has shape {shape(key_padding_mask)}; it must be (B, Sk), ({batch}, {keys})"
            )
        require_device("key_padding_mask", key_padding_mask, "query", query)
    if bias is not None:
        if bias.dtype != query.dtype and bias.dtype != torch.float32:
            raise TypeError(
                f"bias has dtype {bias.dtype}; allowed are that of query, {query.dtype}, and torch.float32"
            )
        full = (batch, heads, rows, keys)
        size = tuple(bias.shape)
        if not broadcasts(size, full):
            raise ValueError(f"bias has shape {size}; it must broadcast to (B, H, Sq, Sk), {full}")
        require_device("bias", bias, "query", query)


def check_numbers(softmax_scale: float, window_left: int, window_right: int, softcap: float) -> None:
    if window_left < -1 or window_right < -1:
        raise ValueError(
            f"window=({window_left}, {window_right}) is out of range; allowed are -1 (no limit), 0, 1, ..."
        )
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap={softcap} is out of range; allowed are 0 (none) and positive numbers")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale={softmax_scale} is out of range; it must be finite")


def window_sides(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """The public function's pair as the operator's two numbers, -1 for no limit."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window={window!r} must be a pair (left, right) of sizes, with None for no limit")
    for side in window:
        if side is not None and side < 0:
            raise ValueError(
                f"window={window!r} has a negative side; allowed are 0, 1, ... and None for no limit"
            )
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def check_head_terms(
    query: Tensor, heads: int, sequences: int, alibi_slopes: Tensor | None, sinks: Tensor | None
) -> None:
    """What a head adds to its logits without a tensor of logits."""
    if alibi_slopes is not None:
        if alibi_slopes.dtype != torch.float32:
            raise TypeError(f"alibi_slopes has dtype {alibi_slopes.dtype}; it must be torch.float32")
        size = tuple(alibi_slopes.shape)
        if size != (heads,) and size != (sequences, heads):
            raise ValueError(
                f"alibi_slopes has shape {size}; it must be (H,) or (B, H), "
                f"({heads},) or ({sequences}, {heads})"
            )
        require_device("alibi_slopes", alibi_slopes, "query", query)
    if sinks is not None:
        if sinks.dtype != query.dtype and sinks.dtype != torch.float32:
            raise TypeError(
                f"sinks has dtype {sinks.dtype}; allowed are that of query, {query.dtype}, and torch.float32"
            )
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"sinks has shape {shape(sinks)}; it must be (H,), ({heads},)")
        require_device("sinks", sinks, "query", query)


def _check_packed(
    query: Tensor,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    for name, tensor in (("key_padding_mask", key_padding_mask), ("bias", bias)):
        if tensor is not None:
            raise ValueError(
                f"{name} has shape {shape(tensor)} with cu_seqlens; it must be None for packed sequences"
            )
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing} is None; cu_seqlens_q and cu_seqlens_k must be given together")
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be torch.int32")
        if tensor.dim() != 1 or tensor.shape[0] < 1:
            raise ValueError(f"{name} has shape {shape(tensor)}; it must be (B + 1,)")
        require_device(name, tensor, "query", query)
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise ValueError(
            f"cu_seqlens_k has shape {shape(cu_seqlens_k)}; it must be that of cu_seqlens_q, "
            f"{shape(cu_seqlens_q)}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            raise ValueError(f"{name}={longest} is negative; it must be at least the longest sequence")


# On a GPU reading cu_seqlens waits for the device, so a tensor is read once: id -> (weak reference, version,
# longest).
_seen: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...]]] = {}


def check_values(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What needs the numbers in cu_seqlens; run with real tensors only, inside the operator."""
    if len(args) <= 6 or args[5] is None:
        return
    query, key = args[0], args[1]
    _check_cu_seqlens("cu_seqlens_q", args[5], query.shape[0], "max_seqlen_q", options.get("max_seqlen_q", 0))
    _check_cu_seqlens("cu_seqlens_k", args[6], key.shape[0], "max_seqlen_k", options.get("max_seqlen_k", 0))


def _check_cu_seqlens(name: str, cu: Tensor, total: int, max_name: str, max_seqlen: int) -> None:
    if cu.device.type == "cuda":
        state = (None if cu.is_inference() else cu._version, total, max_seqlen)
        seen = _seen.get(id(cu))
        if seen is not None and seen[0]() is cu and seen[1] == state:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        number = id(cu)
        _seen[number] = (weakref.ref(cu, lambda _: _seen.pop(number, None)), state)
    values = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} starts at {values[0]}; it must start at 0")
    longest = 0
    for before, after in itertools.pairwise(values):
        if after < before:
            raise ValueError(f"{name} goes down from {before} to {after}; it must not decrease")
        longest = max(longest, after - before)
    if values[-1] != total:
        raise ValueError(f"{name} ends at {values[-1]}; it must end at the number of rows, {total}")
    if longest > max_seqlen:
        raise ValueError(
            f"{max_name}={max_seqlen} is less than the longest sequence; it must be at least {longest}"
        )
