"""flash-attention's functions, with their signatures and meanings, on `bigmodel_kernels.attention` and
`attention_decode`.

Common to all:
  Layout (batch, seqlen, heads, headdim), or (total, heads, headdim) with cu_seqlens. float16 and bfloat16 as
  in flash-attention, and float32 and float64; headdim 1 to 256; any strides. nheads_k divides nheads.
  causal: aligned bottom-right: query i sees key j <= i + seqlen_k - seqlen_q. window_size (left, right):
  query i sees keys i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right; negative is no limit on
  a side, and causal makes right 0. softcap: 0 and less is none. alibi_slopes: float32 (nheads,) or (batch,
  nheads): logits -= slope * |i + seqlen_k - seqlen_q - j|. A query that sees no key gets zeros, and an lse of
  +inf, as there. dropout draws its seed from torch's generator, and drops with softcap too.
  deterministic: gradients are the same bits from run to run. Without, they are but for the CUDA kernels of
  Hopper.
  return_attn_probs: (out, softmax_lse, S_dmask). softmax_lse float32 (float64 for float64), (batch, nheads,
  seqlen_q), or (nheads, total_q); it has a gradient here. S_dmask: an empty tensor without dropout; with it,
  (batch, nheads, seqlen_q, seqlen_k) in the dtype of q: the probabilities, exactly, negative where dropped,
  and 0 outside of a packed sequence. Made in plain PyTorch: for tests, as there.

Errors are ValueError (TypeError for dtypes) that name the argument, its value and what is allowed.

Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691); signatures of
https://github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention import attention
from bigmodel_kernels.ops.attention.checks import check_head_terms
from bigmodel_kernels.ops.attention.decode import attention_decode
from bigmodel_kernels.ops.philox import keep_attention
from bigmodel_kernels.ops.registration import draw_seed, public, require_float, require_like, shape
from bigmodel_kernels.ops.rotary import rotary

# ------------------------------------------------------------------------------------------------------------
# one length


@public
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, nheads, headdim) to k, v (batch, seqlen_k, nheads_k, headdim).

    Returns out (batch, seqlen_q, nheads, headdim), contiguous. Differentiable in q, k and v. The other
    arguments, what `return_attn_probs` adds, dtypes and errors: at the top of this file.
    """
    _check(q, k, v, rank=4)
    options = _options(softmax_scale, window_size, softcap, alibi_slopes, dropout_p)
    seed = draw_seed(dropout_p, q.device)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = attention(
        query,
        key,
        value,
        is_causal=causal,
        dropout_p=dropout_p,
        dropout_seed=seed,
        deterministic=deterministic,
        return_logsumexp=True,
        **options,
    )
    if not return_attn_probs:
        return out.transpose(1, 2)
    probabilities = q.new_empty(0)
    if seed is not None:
        probabilities = _signed(query, key, lse, causal, seed, dropout_p, 0, options)
    return out.transpose(1, 2), _their_lse(lse), probabilities


@public
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor kv (batch, seqlen_k, 2, nheads_k, headdim)."""
    k, v = _unpacked("kv", kv, rank=5, parts=2)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap),
        *(alibi_slopes, deterministic, return_attn_probs),
    )


@public
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor qkv (batch, seqlen, 3, nheads, headdim)."""
    q, k, v = _unpacked("qkv", qkv, rank=5, parts=3)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap),
        *(alibi_slopes, deterministic, return_attn_probs),
    )


# ------------------------------------------------------------------------------------------------------------
# packed sequences


@public
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of packed sequences: q (total_q, nheads, headdim) to k, v (total_k, nheads_k, headdim).

    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where the sequences begin and end; the last is the total.
    max_seqlen_q, max_seqlen_k: at least the longest sequence. block_table: int32 (batch, blocks): k and v are
    pages (num_blocks, page_block_size, nheads_k, headdim), of any size, and key n of sequence b, of as many
    as cu_seqlens_k says, lies in page block_table[b, n // page_block_size]; they are gathered first, and get
    gradients.

    Returns out (total_q, nheads, headdim). Differentiable in q, k and v. The other arguments, what
    `return_attn_probs` adds, dtypes and errors: at the top of this file.
    """
    if block_table is not None:
        k, v = _from_pages(k, v, cu_seqlens_k, block_table)
    _check(q, k, v, rank=3)
    options = _options(softmax_scale, window_size, softcap, alibi_slopes, dropout_p)
    seed = draw_seed(dropout_p, q.device)
    out, lse = attention(
        q,
        k,
        v,
        is_causal=causal,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=int(max_seqlen_q),
        max_seqlen_k=int(max_seqlen_k),
        dropout_p=dropout_p,
        dropout_seed=seed,
        deterministic=deterministic,
        return_logsumexp=True,
        **options,
    )
    if not return_attn_probs:
        return out
    probabilities = q.new_empty(0)
    if seed is not None:
        batch = cu_seqlens_q.shape[0] - 1
        probabilities = q.new_zeros((batch, q.shape[1], int(max_seqlen_q), int(max_seqlen_k)))
        for b in range(batch):
            rows, keys = (slice(*cu[b : b + 2].tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
            query, key = (t.transpose(0, 1)[None] for t in (q[rows], k[keys]))
            alone = _of_sequence(options, b)
            one = _signed(query, key, lse[None, :, rows], causal, seed, dropout_p, b, alone)
            probabilities[b : b + 1, :, : one.shape[2], : one.shape[3]] = one
    return out, _their_lse(lse), probabilities


@public
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor kv (total_k, 2, nheads_k, headdim)."""
    k, v = _unpacked("kv", kv, rank=4, parts=2)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale),
        *(causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


@public
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor qkv (total, 3, nheads, headdim)."""
    q, k, v = _unpacked("qkv", qkv, rank=4, parts=3)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale),
        *(causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


# ------------------------------------------------------------------------------------------------------------
# a cache


@public
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new tokens to a cache of keys and values, to which their own are added first.

    Args:
      q: (batch, seqlen_q, nheads, headdim).
      k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table pages
        (num_blocks, page_block_size, nheads_k, headdim) of any size. The last dimension contiguous.
      k, v: (batch, seqlen_new, nheads_k, headdim), written into the caches, in place, from cache_seqlens on.
        None: the cache is read as it is.
      rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2), with k and v only, in the dtype of q or float32,
        seqlen_ro at least the room of the cache. k is turned by the angles of its places, from cache_seqlens
        on; q by those from cache_seqlens on if causal or with a window, else all of it by that of
        cache_seqlens. `rotary_interleaved`: pairs of neighbours, else elements n and n + rotary_dim / 2.
      cache_seqlens: int32 (batch,) or one int: the tokens in the cache before this call; needed with k. None:
        the cache is full.
      cache_batch_idx: int32 (batch,): the row of the cache of each sequence; not with block_table.
      cache_leftpad: int32 (batch,): where in its row each sequence begins; not with block_table. The keys are
        moved to the front of a copy of the cache.
      block_table: int32 (batch, blocks), the pages of each sequence in order. Its entries past the end of a
        sequence are not read.
      num_splits: how flash-attention is to split the work; here the operator decides.
      The others are at the top of this file; seqlen_k is what the cache holds after k was added.

    Returns out (batch, seqlen_q, nheads, headdim), or with return_softmax_lse (out, lse float32 (batch,
    nheads, seqlen_q)). There is no gradient, as there: a backward through the result raises.

    On the CPU lengths and pages are checked; on a GPU, where that would wait for it, they are not.
    """
    del num_splits
    _check_cache(q, k_cache, v_cache, k, v, block_table)
    # Everything is checked before the cache is written to.
    options = _options(softmax_scale, window_size, softcap, alibi_slopes)
    batch, rows = q.shape[:2]
    check_head_terms(q, q.shape[2], batch, alibi_slopes, None)
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if block_table is not None:
        for name, other in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if other is not None:
                raise ValueError(f"{name} has shape {shape(other)} with block_table; only one can be given")
        _check_numbers("block_table", block_table, (batch, block_table.shape[-1]), q)
    elif cache_batch_idx is not None:
        _check_numbers("cache_batch_idx", cache_batch_idx, (batch,), q, k_cache.shape[0] - 1)
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache has batch {k_cache.shape[0]}; it must be that of q, {batch}, without cache_batch_idx"
        )
    new = 0 if k is None else k.shape[1]
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens is None with k; it must say where k is written")
    lengths = _lengths(cache_seqlens, batch, q, room, new)
    if cache_leftpad is not None:
        _check_numbers("cache_leftpad", cache_leftpad, (batch,), q, room)
        if q.device.type == "cpu" and bool((cache_leftpad > lengths).any()):
            raise ValueError(
                f"cache_leftpad={cache_leftpad.tolist()} is more than cache_seqlens={lengths.tolist()}"
            )

    if block_table is not None and q.device.type == "cpu":
        _check_pages(block_table, lengths + new, k_cache)
    places = lengths.long()[:, None] + torch.arange(new, device=q.device)  # of the new tokens
    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos is given without k; queries are turned with new keys only")
        advance = causal or any(side is not None for side in options["window"])
        steps = torch.arange(rows, device=q.device)
        q_places = lengths.long()[:, None] + (steps if advance else torch.zeros_like(steps))
        cos, sin = _checked_angles(q, rotary_cos, rotary_sin, room, q_places)
        q = _turned(q, q_places, cos, sin, rotary_interleaved)
        k = _turned(k, places, cos, sin, rotary_interleaved)
    if k is not None and v is not None:
        at = _cache_places(k_cache, places, cache_batch_idx, block_table)
        with torch.no_grad():
            k_cache[at] = k
            v_cache[at] = v
        lengths = lengths + new
    if cache_leftpad is not None:
        k_cache, v_cache = (_moved(c, cache_leftpad, cache_batch_idx) for c in (k_cache, v_cache))
        lengths = lengths - cache_leftpad
    elif cache_batch_idx is not None:
        block_table = cache_batch_idx[:, None]  # a row of the cache is a page
    out, lse = attention_decode(
        *(q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), lengths, block_table),
        is_causal=causal,
        return_logsumexp=True,
        **options,
    )
    return (out.transpose(1, 2), _their_lse(lse)) if return_softmax_lse else out.transpose(1, 2)


def _cache_places(
    cache: Tensor, places: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The index of tokens (batch, n) in a cache."""
    if block_table is None:
        row = cache_batch_idx
        if row is None:
            row = torch.arange(places.shape[0], device=places.device)
        return row.long()[:, None], places
    size = max(1, cache.shape[1])
    return block_table.long().gather(1, places // size), places % size


def _moved(cache: Tensor, leftpad: Tensor, cache_batch_idx: Tensor | None) -> Tensor:
    """A copy of the cache in which each sequence begins at 0."""
    places = torch.arange(cache.shape[1], device=cache.device) + leftpad[:, None]
    return cache[_cache_places(cache, places.clamp_(max=cache.shape[1] - 1), cache_batch_idx, None)]


def _turned(x: Tensor, places: Tensor, cos: Any, sin: Any, interleaved: bool) -> Tensor:
    """x (batch, n, heads, headdim) turned by the angles of its places (batch, n)."""
    x = x.transpose(1, 2)
    # The operator turns queries and keys together; here they have places of their own.
    turned, _ = rotary(
        x, x[:, :1], cos[places], sin[places], rotary_dim=2 * cos.shape[-1], interleaved=interleaved
    )
    return turned.transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------
# what the functions share


def _options(
    softmax_scale: float | None,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """Their options in the terms of our operators."""
    try:
        left, right = (int(side) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size={window_size!r} must be a pair (left, right) of ints, negative for no limit"
        ) from None
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} is out of range; allowed is 0 <= dropout_p < 1")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale={softmax_scale} is out of range; it must be finite")
    if not math.isfinite(softcap):
        raise ValueError(f"softcap={softcap} is out of range; it must be finite, and 0 for none")
    return {
        "softmax_scale": softmax_scale,
        "window": (None if left < 0 else left, None if right < 0 else right),
        "softcap": max(0.0, softcap),
        "alibi_slopes": alibi_slopes,
    }


def _of_sequence(options: dict[str, Any], b: int) -> dict[str, Any]:
    slopes = options["alibi_slopes"]
    return {**options, "alibi_slopes": slopes[b] if slopes is not None and slopes.dim() == 2 else slopes}


def _unpacked(name: str, packed: Tensor, *, rank: int, parts: int) -> tuple[Tensor, ...]:
    if packed.dim() != rank or packed.shape[-3] != parts:
        form = "batch, seqlen" if rank == 5 else "total"
        raise ValueError(f"{name} has shape {shape(packed)}; it must be ({form}, {parts}, heads, headdim)")
    return packed.unbind(-3)


def _check(q: Tensor, k: Tensor, v: Tensor, *, rank: int) -> None:
    """By their names for the arguments; what is not checked here the operator checks."""
    require_float("q", q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != rank:
            form = "(batch, seqlen, heads, headdim)" if rank == 4 else "(total, heads, headdim)"
            raise ValueError(f"{name} has shape {shape(tensor)}; it must have {rank} dimensions, {form}")
    require_like("k", k, "q", q)
    require_like("v", v, "q", q)
    _check_heads(q, "k", k, "v", v)
    if rank == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}; it must be that of q, {q.shape[0]}")


def _check_heads(q: Tensor, k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    dim = q.shape[-1]
    if not 1 <= dim <= 256:
        raise ValueError(f"q has headdim {dim}; allowed are 1 to 256")
    if v.shape != k.shape:
        raise ValueError(f"{v_name} has shape {shape(v)}; it must be that of {k_name}, {shape(k)}")
    if k.shape[-1] != dim:
        raise ValueError(f"{k_name} has headdim {k.shape[-1]}; it must be that of q, {dim}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{k_name} has {k.shape[-2]} heads; they must divide the {q.shape[-2]} heads of q")


def _check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
) -> None:
    require_float("q", q)
    cache = "(batch, seqlen, heads, headdim)"
    if block_table is not None:
        cache = "(num_blocks, page_block_size, heads, headdim)"
        if block_table.dim() != 2:
            raise ValueError(f"block_table has shape {shape(block_table)}; it must be (batch, blocks)")
    for name, tensor, form in (("q", q, "(batch, seqlen, heads, headdim)"), ("k_cache", k_cache, cache)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {shape(tensor)}; it must have 4 dimensions, {form}")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        require_like(name, tensor, "q", q)
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1")
    _check_heads(q, "k_cache", k_cache, "v_cache", v_cache)
    if (k is None) != (v is None):
        missing, there = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing} is None with {there}; k and v must be given together")
    for name, given in (("k", k), ("v", v)):
        if given is None:
            continue
        require_like(name, given, "q", q)
        new = k.shape[1] if k is not None and k.dim() == 4 else 0
        full = (q.shape[0], new, *k_cache.shape[2:])
        if tuple(given.shape) != full:
            raise ValueError(
                f"{name} has shape {shape(given)}; it must be (batch, seqlen_new, heads, headdim), as the "
                f"other, with ({full[0]}, .., {full[2]}, {full[3]})"
            )


def _check_numbers(
    name: str, numbers: Tensor, size: tuple[int, ...], q: Tensor, largest: int | None = None
) -> None:
    """int32 of this size, and on the CPU from 0 to the largest value allowed."""
    if numbers.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {numbers.dtype}; it must be torch.int32")
    if tuple(numbers.shape) != size:
        raise ValueError(f"{name} has shape {shape(numbers)}; it must be {size}")
    if numbers.device != q.device:
        raise ValueError(f"{name} is on {numbers.device}; it must be on the device of q, {q.device}")
    if largest is not None and numbers.device.type == "cpu" and numbers.numel():
        for value in numbers.flatten().tolist():
            if not 0 <= value <= largest:
                raise ValueError(f"{name} holds {value}; allowed are 0 to {largest}")


def _check_pages(block_table: Tensor, lengths: Tensor, cache: Tensor) -> None:
    """The pages of what each sequence will hold; entries behind them may be anything."""
    size = max(1, cache.shape[1])
    used = torch.arange(block_table.shape[1]) * size < lengths[:, None]
    wrong = block_table[used & ((block_table < 0) | (block_table >= cache.shape[0]))]
    if wrong.numel():
        raise ValueError(f"block_table holds {int(wrong[0])}; allowed are 0 to {cache.shape[0] - 1}")


def _lengths(cache_seqlens: int | Tensor | None, batch: int, q: Tensor, room: int, new: int) -> Tensor:
    """The tokens in the cache, int32 (batch,)."""
    if isinstance(cache_seqlens, Tensor):
        _check_numbers("cache_seqlens", cache_seqlens, (batch,), q, room - new)
        return cache_seqlens
    length = room if cache_seqlens is None else int(cache_seqlens)
    if not 0 <= length <= room - new:
        raise ValueError(f"cache_seqlens={length}; allowed are 0 to {room - new}, the room of the cache")
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _checked_angles(
    q: Tensor, cos: Tensor | None, sin: Tensor | None, room: int, q_places: Tensor
) -> tuple[Tensor, Tensor]:
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing} is None; rotary_cos and rotary_sin must be given together")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table.dim() != 2 or table.shape != cos.shape or not 1 <= table.shape[1] <= q.shape[-1] // 2:
            raise ValueError(
                f"{name} has shape {shape(table)}; both must be (seqlen_ro, rotary_dim / 2), with a "
                f"rotary_dim of 2 to the headdim, {q.shape[-1]}"
            )
        if table.device != q.device:
            raise ValueError(f"{name} is on {table.device}; it must be on the device of q, {q.device}")
    if q.device.type == "cpu" and q_places.numel():
        room = max(room, int(q_places.max()) + 1)
    if cos.shape[0] < room:
        raise ValueError(
            f"rotary_cos has {cos.shape[0]} places; it must have those of the cache and of q, {room}"
        )
    return cos, sin


def _from_pages(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, ...]:
    """The keys and values of packed sequences (total_k, heads, headdim) that lie in pages."""
    if k.dim() != 4 or v.shape != k.shape:
        raise ValueError(
            f"k has shape {shape(k)} and v {shape(v)} with block_table; both must be (num_blocks, "
            "page_block_size, heads, headdim)"
        )
    batch = cu_seqlens_k.shape[0] - 1
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(f"block_table has shape {shape(block_table)}; it must be ({batch}, blocks)")
    lengths = cu_seqlens_k.diff().long()
    size = k.shape[1]
    if cu_seqlens_k.device.type == "cpu" and batch and int(lengths.max()) > size * block_table.shape[1]:
        raise ValueError(
            f"block_table has {block_table.shape[1]} pages of {size} for a sequence of {int(lengths.max())} "
            "keys; it must have enough"
        )
    sequence = torch.arange(batch, device=k.device).repeat_interleave(lengths)
    place = torch.arange(sequence.shape[0], device=k.device) - cu_seqlens_k.long()[sequence]
    at = (block_table.long()[sequence, place // size], place % size)
    return k[at], v[at]


def _their_lse(lse: Tensor) -> Tensor:
    """A query that sees no key has an lse of +inf there, and of -inf here."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _signed(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    causal: bool,
    seed: Tensor,
    dropout_p: float,
    sequence: int,
    options: dict[str, Any],
) -> Tensor:
    """The probabilities (batch, nheads, seqlen_q, seqlen_k), negative where they were dropped."""
    query, key, lse = query.detach(), key.detach(), lse.detach()
    heads, rows, dim = query.shape[1:]
    keys = key.shape[2]
    sums = lse.dtype
    scale = dim**-0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    spread = key.to(sums).repeat_interleave(heads // key.shape[1], 1)
    logits = query.to(sums) @ spread.transpose(-1, -2) * scale
    if options["softcap"]:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    distance = torch.arange(rows, device=query.device)[:, None] + keys - rows
    distance = distance - torch.arange(keys, device=query.device)
    if options["alibi_slopes"] is not None:
        logits = logits - options["alibi_slopes"].to(sums)[..., None, None] * distance.abs()
    left, right = options["window"]
    right = 0 if causal else right
    if left is not None:
        logits = logits.masked_fill(distance > left, -torch.inf)
    if right is not None:
        logits = logits.masked_fill(distance < -right, -torch.inf)
    weights = torch.exp(logits - _their_lse(lse)[..., None])
    keep = keep_attention(seed, dropout_p, sequence, heads, slice(0, rows), slice(0, keys), weights)
    return torch.where(keep == 0, -weights, weights).to(query.dtype)
