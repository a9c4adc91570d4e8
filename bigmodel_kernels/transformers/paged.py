"""What transformers' continuous batching tells a layer, and attention of it.

The tokens of all requests stand one behind the other in one row: query (1, H, total_q, D), with
`cu_seq_lens_q` and `cu_seq_lens_k` for where each request begins and ends. Keys and values live in the pages of
a `PagedAttentionCache`, whose `update` either gives those of every request, gathered one behind the other
(prompts, and batches of prompts and decoding requests), or leaves a block table and the pages (batches in
which every request has one new token). The first runs in `bigmodel::attention`, the second in
`bigmodel::attention_decode`. No mask is made.

transformers' side: generation/continuous_batching, and `_flash_attention_forward`, which reads the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from bigmodel_kernels.ops.attention import attention
from bigmodel_kernels.ops.attention.decode import attention_decode

#: The cache of continuous batching, where masks know of it and models hand it down as their cache.
CACHE: type | None = getattr(masking_utils, "PagedAttentionCache", None)
#: The first transformers of which that is true.
SINCE = "5.24"

#: What `update` reads, and what it leaves for attention.
_ARGUMENTS = (
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("read_index", "write_index", "block_table"),
)


def is_paged(cache: Any) -> bool:
    return CACHE is not None and isinstance(cache, CACHE)


def arguments(cache: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What a layer was told of continuous batching; None if its cache is another, or not all was told."""
    if not is_paged(cache) or not all(name in kwargs for name in _ARGUMENTS):
        return None
    return {name: kwargs[name] for name in _ARGUMENTS}


class Sequences(NamedTuple):
    """The requests of a batch, as a layer sees them: where they begin and end, and where their keys are."""

    cu_seqlens_q: Tensor  # int32 (requests + 1,)
    cu_seqlens_k: Tensor
    longest_q: int | None
    longest_k: int | None
    block_table: Tensor | None = None  # int32 (requests, blocks)
    k_cache: Tensor | None = None  # (pages, page size, Hkv, D)
    v_cache: Tensor | None = None


def sequences(kwargs: dict[str, Any]) -> Sequences | None:
    """Those of a call of the attention function, after `update`; None for a call without any."""
    starts = [kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")]
    if starts == [None, None]:
        return None
    for name, given in zip(_ARGUMENTS[:2], starts, strict=True):
        if not isinstance(given, Tensor):
            raise TypeError(
                f"{name} is a {type(given).__name__}; it must be a tensor, as the cache's update leaves it"
            )
    cu_q, cu_k = (given.to(torch.int32) for given in starts)
    pages = [kwargs.get(name) for name in ("k_cache", "v_cache")]
    table = kwargs.get("block_table") if pages[0] is not None else None
    return Sequences(cu_q, cu_k, kwargs.get("max_length_q"), kwargs.get("max_length_k"), table, *pages)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    requests: Sequences,
    *,
    is_causal: bool,
    softmax_scale: float,
    window: int | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Attention of query (1, H, total_q, D) on key and value (1, Hkv, total_k, D), each request on its own, to
    (1, total_q, H, D). `window` counts the keys on a side, that of the query included.

    With a block table, key and value are those of the new tokens, one a request, which are written into the
    pages first.
    """
    side = None if window is None else window - 1
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "softmax_scale": softmax_scale,
        "window": (side, None if is_causal else side),
        "softcap": softcap,
        "sinks": sinks,
    }
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    if requests.block_table is not None:
        lengths = requests.cu_seqlens_k.diff()
        _write(key, value, lengths, requests)
        pages = (cache.transpose(1, 2) for cache in (requests.k_cache, requests.v_cache))
        out = attention_decode(query[:, :, None], *pages, lengths, requests.block_table, **options)
        return out.transpose(1, 2).flatten(0, 1)[None]
    out = attention(
        *(query, key, value),
        cu_seqlens_q=requests.cu_seqlens_q,
        cu_seqlens_k=requests.cu_seqlens_k,
        max_seqlen_q=requests.longest_q,
        max_seqlen_k=requests.longest_k,
        dropout_p=dropout_p,
        **options,
    )
    return out[None]


def _write(key: Tensor, value: Tensor, lengths: Tensor, requests: Sequences) -> None:
    """Puts the last key and value of each request, (requests, Hkv, D), into its page."""
    last, size = lengths.long() - 1, requests.k_cache.shape[1]
    page = requests.block_table.long().gather(1, (last // size)[:, None])[:, 0]
    at = (page, last % size)
    requests.k_cache[at] = key
    requests.v_cache[at] = value


def by_request(
    query: Tensor, key: Tensor, value: Tensor, requests: Sequences
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of each request, (1, heads, S, head size)."""
    rows, keys = (starts.diff().tolist() for starts in (requests.cu_seqlens_q, requests.cu_seqlens_k))
    return list(zip(query.split(rows, 2), key.split(keys, 2), value.split(keys, 2), strict=True))
