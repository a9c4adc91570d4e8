"""What transformers' continuous batching tells a layer, and attention of it.

The tokens of all requests stand one behind the other in one row: query (1, H, total_q, D), with
`cu_seq_lens_q` and `cu_seq_lens_k` for where each request begins and ends. Keys and values live in the pages
of a `PagedAttentionCache`, whose `update` either gives those of every request, gathered one behind the other
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


class Pages(NamedTuple):
    """Where the keys and values of each request are, if attention is to read them in place."""

    block_table: Tensor  # int32 (requests, blocks)
    keys: Tensor  # (pages, page size, Hkv, D)
    values: Tensor

    def write(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """Puts the last key and value of each request, (requests, Hkv, D), where they belong."""
        last, size = lengths.long() - 1, self.keys.shape[1]
        at = self.block_table.long().gather(1, (last // size)[:, None])[:, 0], last % size
        self.keys[at] = key
        self.values[at] = value


class Sequences(NamedTuple):
    """The requests of a batch, as a layer sees them: where they begin and end, and where their keys are."""

    cu_seqlens_q: Tensor  # int32 (requests + 1,)
    cu_seqlens_k: Tensor
    longest_q: int | None
    longest_k: int | None
    pages: Pages | None


def sequences(kwargs: dict[str, Any]) -> Sequences | None:
    """Those of a call of the attention function, after `update`; None for a call without any."""
    starts = {name: kwargs.get(name) for name in _ARGUMENTS[:2]}
    if all(given is None for given in starts.values()):
        return None
    for name, given in starts.items():
        if not isinstance(given, Tensor):
            raise TypeError(
                f"{name} is a {type(given).__name__}; it must be a tensor, as the cache's update leaves it"
            )
    cu_q, cu_k = (kwargs[name].to(torch.int32) for name in starts)
    pages = None
    if kwargs.get("k_cache") is not None:
        pages = Pages(kwargs["block_table"], kwargs["k_cache"], kwargs["v_cache"])
    return Sequences(cu_q, cu_k, kwargs.get("max_length_q"), kwargs.get("max_length_k"), pages)


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
    """Attention of query (1, H, total_q, D) on key and value (1, Hkv, total_k, D), each request on its own,
    to (1, total_q, H, D). `window` counts the keys on a side, that of the query included.

    With pages, key and value are those of the new tokens, one a request, which are written there first.
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
    if requests.pages is None:
        out: Any = attention(
            *(query, key, value),
            cu_seqlens_q=requests.cu_seqlens_q,
            cu_seqlens_k=requests.cu_seqlens_k,
            max_seqlen_q=requests.longest_q,
            max_seqlen_k=requests.longest_k,
            dropout_p=dropout_p,
            **options,
        )
        return out[None]  # type: ignore[no-any-return]
    lengths, pages = requests.cu_seqlens_k.diff(), requests.pages
    pages.write(key, value, lengths)
    keys, values = (cache.transpose(1, 2) for cache in pages[1:])
    out = attention_decode(query[:, :, None], keys, values, lengths, pages.block_table, **options)
    return out.transpose(1, 2).flatten(0, 1)[None]  # type: ignore[no-any-return]


def by_request(
    query: Tensor, key: Tensor, value: Tensor, requests: Sequences
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of each request, (1, heads, S, head size)."""
    rows, keys = (starts.diff().tolist() for starts in (requests.cu_seqlens_q, requests.cu_seqlens_k))
    return list(zip(query.split(rows, 2), key.split(keys, 2), value.split(keys, 2), strict=True))
