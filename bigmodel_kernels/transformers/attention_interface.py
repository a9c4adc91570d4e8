"""`attn_implementation="bigmodel"`: the attention function and the mask function that transformers calls.

The mask function keeps masks small. What it returns says by its shape what it means, so that it survives the
trip through any model, `torch.compile` included:

    None            what it means for sdpa: nothing masked, or causal where the module or the call says so
    (B, S)          causal; True is a real token; the last query is at position S - 1. A static cache has keys
                    past S, which do not exist yet; a sliding cache has only the last ones of S
    (B, 1, S)       the same within a sliding window, which rides along as an attribute of the tensor
    (B, 2, S)       padding, and a sliding window to both sides, which rides along as well
    (B, 1, 1, S)    padding only, every query sees every real key; an attribute says that it is ours
    (B, 1, Sq, Sk)  any other pattern, dense, as sdpa has it; also what a user passes, boolean or additive

`generate` makes masks ahead of the model for static caches and passes them as if they were the user's: the
first two go through the mask function again and come out the same, the others are passed on by transformers
as they are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.utils.output_capturing import _active_collector as collector

from bigmodel_kernels.ops.attention_maps import attention_probabilities
from bigmodel_kernels.ops.registration import wants_gradient
from bigmodel_kernels.transformers import blocks, config_view, growing_cache, paged
from bigmodel_kernels.transformers.autoregister import FLASH_NAME, NAME

#: Caches whose `update` gives keys and values as the operator reads them.
CACHES: tuple[type, ...] = (type(None), DynamicCache, StaticCache)

#: Under which names a cache is given; the last is older.
_CACHE_NAMES = ("cache", "layer_past", "past_key_values")

#: Who makes masks that `visibility` reads; flash attention's say nothing of a window.
_MASK_MAKERS = (NAME, FLASH_NAME, "sdpa", "eager", None)

_logger = logging.getLogger(__name__)
_WINDOW = "_bigmodel_window"
_PADDING = "_bigmodel_padding"


# ------------------------------------------------------------------------------------------------------------
# masks


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a layer, as small as its pattern allows. The arguments are those of `sdpa_mask`."""
    tracing = is_tracing(attention_mask)
    if not tracing:
        _check_reads_the_interface(kwargs.get("config"))

    def dense() -> Tensor:
        options = {k: v for k, v in kwargs.items() if k not in ("dtype", "config")}
        mask = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **options,
        )
        assert mask is not None
        return mask

    if attention_mask is not None and attention_mask.dim() == 3:
        attention_mask = _made_ahead(attention_mask)
    pattern = _pattern(mask_function, tracing)
    if pattern is None or (attention_mask is not None and attention_mask.dim() != 2):
        return dense()
    causal, window = pattern
    skips = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    if not skips and not config_view.keeps_masks_short(kwargs.get("config")):
        return dense()  # the caller goes on to combine it with another mask

    if not causal:
        if window is not None and window < kv_length:
            if kv_offset or isinstance(q_offset, Tensor) or q_offset or q_length != kv_length:
                return dense()
            padding = _tokens(attention_mask, kv_length)
            if padding is None:
                padding = torch.ones(
                    batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu")
                )
            return _windowed(padding[:, None].expand(-1, 2, -1), window)
        padding = _tokens(attention_mask, kv_offset + kv_length)
        if padding is None or (not tracing and bool(padding[:, kv_offset:].all())):
            return None
        padding = padding[:, None, None, kv_offset:]
        if not tracing:  # under torch.compile nobody packs
            setattr(padding, _PADDING, True)
        return padding

    if isinstance(q_offset, Tensor):
        if tracing:
            return dense()
        q_offset = int(q_offset)
    seen = q_offset + q_length  # tokens up to the last query
    keys = seen - kv_offset
    if not q_length <= keys <= kv_length or (kv_offset and keys != kv_length):
        return dense()
    padding = _tokens(attention_mask, seen)
    if padding is not None and not tracing and bool(padding[:, kv_offset:].all()):
        padding = None
    if window is not None and window < keys:
        if padding is None:
            padding = torch.ones(batch_size, seen, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        return _windowed(padding[:, None], window)
    if padding is not None:
        return padding
    if keys == q_length or (q_length == 1 and keys == kv_length):
        return None  # as for sdpa: causal over the first q_length keys, or one query that sees all
    return torch.ones(batch_size, seen, dtype=torch.bool, device=kwargs.get("device", "cpu"))


def _made_ahead(mask: Tensor) -> Tensor:
    """The tokens of a mask of three dimensions that `generate` had made by us, and passes as the user's."""
    if mask.dtype != torch.bool or mask.shape[1] > 2:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
            "allowed are 2 dimensions (B, Sk) and 4 (B, 1, Sq, Sk)"
        )
    return mask[:, 0]


def _windowed(mask: Tensor, window: int) -> Tensor:
    setattr(mask, _WINDOW, window)
    return mask


def is_tracing(tensor: Tensor | None) -> bool:
    """Whether values may not be looked at: torch.compile, export, jit.trace, fake tensors, CUDA graph
    capture.
    """
    return bool(masking_utils.is_tracing(tensor))  # type: ignore[attr-defined]


def _tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """The 2D mask of the first `length` tokens. Tokens that it does not speak of are not there."""
    if mask is None:
        return None
    if mask.shape[-1] < length:
        mask = torch.nn.functional.pad(mask, (0, length - mask.shape[-1]))
    return mask[:, :length].to(torch.bool)


def _pattern(function: Any, tracing: bool) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function of transformers, or None for one that we do not know.

    A window counts the keys on a side, and that of the query.
    """
    if function is masking_utils.causal_mask_function:
        return True, None
    if function is masking_utils.bidirectional_mask_function:
        return False, None
    if tracing:
        return None  # the closures below cannot be looked into while tracing; a dense mask is as right
    parts = _closure(function, _AND_MASK).get("mask_functions")
    if parts is None or len(parts) != 2:
        return None
    causal = parts[1] is masking_utils.causal_mask_function
    if not causal and parts[1] is not masking_utils.bidirectional_mask_function:
        return None
    window = _closure(parts[0], _WINDOW_OVERLAY if causal else _TWO_SIDED_OVERLAY).get("sliding_window")
    if not isinstance(window, int) or window < causal:
        return None
    return causal, window if causal else window + 1


def _closure(function: Any, maker: Any) -> dict[str, Any]:
    """The variables that `function` closes over, if it is one of those that `maker` makes; else nothing."""
    if getattr(function, "__code__", None) is not maker.__code__ or function.__closure__ is None:
        return {}
    return dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True)
    )


_AND_MASK = masking_utils.and_masks()
_WINDOW_OVERLAY = masking_utils.sliding_window_overlay(1)
_TWO_SIDED_OVERLAY = masking_utils.sliding_window_bidirectional_overlay(1)


_reads_the_interface: set[type] = set()


def _check_reads_the_interface(config: Any) -> None:
    """Some modeling files (mpnet, deberta, longformer, ...) compute attention themselves and would misread
    our masks. A view is given only to models whose attention has a patched form, which reads them.
    """
    cls = type(config)
    if config is None or cls in _reads_the_interface or config_view.is_view(config):
        return
    folder, _, name = cls.__module__.rpartition(".")
    if folder.startswith("transformers.models.") and name.startswith("configuration_"):
        modeling = sys.modules.get(f"{folder}.{name.replace('configuration_', 'modeling_', 1)}")
        if modeling is not None and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
            raise ValueError(
                f"attn_implementation='bigmodel' does not suit {cls.__name__}: {modeling.__name__} does "
                "not call transformers' attention interface; use 'eager' or what else the model supports"
            )
    _reads_the_interface.add(cls)


# ------------------------------------------------------------------------------------------------------------
# attention


@dataclass
class Visibility:
    """Which keys a query sees, in the terms of `bigmodel::attention`, and how many keys there are."""

    keys: int
    causal: bool = False
    window: int | None = None  # keys to the left, this one included
    two_sided: bool = False  # and to the right as many
    padding: Tensor | None = None  # bool (B, keys)
    bias: Tensor | None = None  # added to the logits, broadcasts to (B, H, Sq, keys)

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """The window as the operator has it: keys to the left and to the right, without this one."""
        left = None if self.window is None else self.window - 1
        return left, left if self.two_sided else None


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a layer, under the name of the version of transformers."""
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


def updated(
    cache: Any, key: Tensor, value: Tensor, layer: int, told: dict[str, Any] | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys and values of a layer with those in its cache, and what the attention function is to be told of
    them; `told` is what the layer was told of continuous batching (see `paged.arguments`), if that runs.
    """
    if told is None:
        grown = growing_cache.append(cache, key, value, layer)
        return *(grown or cache.update(key, value, layer)), {}
    own = dict(told)  # `update` puts what concerns this layer in the place of what concerns all
    return *cache.update(key, value, layer, kwargs=own), own


def readable(mask: Any) -> bool:
    """Whether `visibility` knows masks of this form."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 3, 4))


def visibility(
    query: Tensor,
    keys: int,
    mask: Tensor | None,
    *,
    is_causal: bool,
    position_bias: Tensor | None = None,
    window: int | None = None,
) -> Visibility:
    """Reads a mask (see the top of this file).

    `is_causal` counts only without one, as for sdpa; `window`, the layer's own, only for a windowed mask that
    was copied on the way and has lost its attribute.
    """
    rows = query.shape[2]
    if mask is None:
        result = Visibility(keys, causal=is_causal and rows > 1)
        if result.causal and keys > rows:
            result.keys = rows  # prefill into an empty static cache: the keys behind are not there yet
        elif result.causal and keys < rows:
            triangle = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
            result.causal, result.bias = False, _additive(triangle, query)
    elif not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask is a {type(mask).__name__}; allowed are a tensor and None")
    elif mask.dim() in (2, 3):
        window = None if mask.dim() == 2 else window_of(mask, window)
        two_sided = mask.dim() == 3 and mask.shape[1] == 2
        mask = mask[:, 0] if mask.dim() == 3 else mask
        mask = mask[:, -keys:]  # a sliding cache has dropped the first ones
        result = Visibility(
            mask.shape[1],
            causal=rows > 1 and not two_sided,
            window=window,
            two_sided=two_sided,
            padding=mask.to(torch.bool),
        )
    elif mask.dim() == 4:
        result = Visibility(keys)
        if mask.dtype != torch.bool:
            result.bias = mask if mask.dtype in (query.dtype, torch.float32) else mask.to(query.dtype)
        elif mask.shape[1] == 1 and mask.shape[2] == 1:
            result.padding = mask[:, 0, 0, :].expand(query.shape[0], -1)
        else:
            result.bias = _additive(mask, query)
    else:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; allowed are 2 and 4 dimensions")
    if position_bias is not None:
        position_bias = position_bias[..., : result.keys].to(query.dtype)
        result.bias = position_bias if result.bias is None else result.bias + position_bias
    return result


def own_window(attention: Any) -> int | None:
    """The sliding window of an attention, or that of its config; None for all keys."""
    config = attention.__dict__.get("config")
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


def window_of_masks(attention: Any) -> int | None:
    """The window that a model has in its masks for an attention: none where its file makes no such masks,
    whatever the config says.
    """
    files = (sys.modules[cls.__module__] for cls in type(attention).__mro__)
    if any(hasattr(file, "create_sliding_window_causal_mask") for file in files):
        return own_window(attention)
    return None


def window_of(mask: Tensor, window: int | None) -> int:
    """That of a mask of three dimensions, which rides along, or else the layer's own."""
    found: int | None = getattr(mask, _WINDOW, window)
    if found is None:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; allowed are 2 dimensions (B, Sk) and 4. "
            "If it was made for a sliding window, it was copied on the way to the attention"
        )
    return found


def set_implementation(model: Any, name: str) -> None:
    """`model.set_attn_implementation(name)`, of the models in it as well.

    Before transformers 5.20 it does not reach the stacks of T5, whose configs are copies of the model's.
    """
    for part in model.modules():
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation(name)


def gets_readable_masks(module: Any) -> bool:
    """Whether the masks that are made for this module are such as `visibility` reads."""
    return module.config._attn_implementation in _MASK_MAKERS


def additive(mask: Tensor | None, states: Tensor, keys: int) -> Tensor:
    """A mask as transformers' eager code takes it, additive (B or 1, 1, Sq, keys), for causal attention of
    states (B, Sq, hidden).
    """
    if mask is not None and mask.dim() == 4:
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
    query = states[:, None]
    seen = visibility(query, keys, mask, is_causal=True)
    visible = _dense_mask(query, seen)
    if visible is None:
        visible = torch.ones(1, 1, query.shape[2], seen.keys, dtype=torch.bool, device=states.device)
    visible = torch.nn.functional.pad(visible, (0, keys - seen.keys))
    visible = visible if visible.dim() == 4 else visible[None, None]
    return additive_of(visible, states)


def additive_of(visible: Tensor, states: Tensor) -> Tensor:
    """A boolean mask as transformers' eager code adds it to logits."""
    hidden = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
    return hidden.masked_fill_(~visible, torch.finfo(states.dtype).min)


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, H, Sq, D) on (B, Hkv, Sk, D) for any transformers model, to the result of its eager
    code.

    Returns the output as (B, Sq, H, D), and the probabilities (B, H, Sq, Sk) where the call asks for them
    (`output_attentions`): those are then computed by `bigmodel::attention_probabilities` next to the kernel's
    output. Where they need a gradient or are dropped, plain PyTorch makes them, and the output of them.
    Dropout of probabilities is otherwise the operator's own.
    `s_aux` (H,) are attention sinks. Value heads of another size than the key's, and heads above 256, run in
    torch's scaled_dot_product_attention and are logged once.
    Without a mask and with `cu_seq_lens_q` and `cu_seq_lens_k`, each sequence attends to itself alone (see
    paged.py).
    """
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    p = dropout if module.training else 0.0
    requests = paged.sequences(kwargs) if attention_mask is None else None
    if requests is not None:
        if position_bias is not None:
            raise ValueError("position_bias with cu_seq_lens_q: sequences one behind the other take no bias")
        if _returns_attentions(kwargs) or observer() is not None:
            raise ValueError(
                "output_attentions with cu_seq_lens_q: probabilities of sequences one behind the other are "
                "not made; look at them in a padded batch"
            )
        window = kwargs.get("sliding_window")
        args = (requests, is_causal, window, scale, p, softcap, s_aux)
        return _attend_packed(module, query, key, value, *args), None
    seen = visibility(
        query,
        key.shape[2],
        attention_mask,
        is_causal=is_causal,
        position_bias=position_bias,
        window=kwargs.get("sliding_window"),
    )
    return attend(module, query, key, value, seen, scale, p, softcap, s_aux, _returns_attentions(kwargs))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Visibility,
    scale: float,
    p: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    wanted: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same of what is `seen`; `p` is the dropout, `wanted` are the probabilities."""
    if seen.keys != key.shape[2]:
        key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
    observe = observer()
    if observe is not None:
        observe(module, query, key, seen, scale, softcap, s_aux)
    # Weights that are dropped are what the output is made of; and their gradient is that through the output.
    if p >= 1 or (wanted and (p or wants_gradient((query, key, seen.bias, s_aux)))):
        weights = _probabilities(query, key, seen, scale, softcap, s_aux)
        weights = torch.dropout(weights, p, p > 0)
        return _weigh(weights, value).transpose(1, 2).contiguous(), weights if wanted else None
    if value.shape[-1] != key.shape[-1] or query.shape[-1] > 256:
        out = _sdpa(query, key, value, seen, scale, softcap, s_aux, p)
    else:
        terms = blocks.terms(query, key, value, seen, scale)
        terms = terms._replace(softcap=softcap or 0.0, sinks=_readable_sinks(s_aux, query))
        out = blocks.attention(terms, p)
    return out.transpose(1, 2), _weights(query, key, seen, scale, softcap, s_aux) if wanted else None


def _attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    requests: paged.Sequences,
    is_causal: bool,
    window: int | None,
    scale: float,
    p: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of sequences one behind the other, (1, heads, total, head size), to (1, total, H, D)."""
    if value.shape[-1] == key.shape[-1] and query.shape[-1] <= 256:
        return paged.packed_attention(
            *(query, key, value, requests),
            is_causal=is_causal,
            softmax_scale=scale,
            window=window,
            softcap=softcap or 0.0,
            sinks=_readable_sinks(sinks, query),
            dropout_p=p,
        )
    parts = []
    for q, k, v in paged.by_request(query, key, value, requests):
        seen = Visibility(k.shape[2], is_causal, window, two_sided=not is_causal)
        parts.append(attend(module, q, k, v, seen, scale, p, softcap, sinks)[0])
    return torch.cat(parts, dim=1)


def _readable_sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """Sinks of a type that the operators read beside this query."""
    return sinks if sinks is None or sinks.dtype in (query.dtype, torch.float32) else sinks.float()


def _dense_mask(query: Tensor, seen: Visibility) -> Tensor | None:
    """Causal, window and padding as one boolean mask; the bias is apart."""
    mask = None if seen.padding is None else seen.padding[:, None, None, :]
    left, right = seen.sides
    if seen.causal or right is not None:
        rows = query.shape[2]
        last = torch.arange(rows, device=query.device)[:, None] + seen.keys - rows
        index = torch.arange(seen.keys, device=query.device)
        pattern = index <= last + (right or 0)
        if left is not None:
            pattern = pattern & (index >= last - left)
        mask = pattern if mask is None else mask & pattern
    return mask


def of_operator(
    query: Tensor, seen: Visibility, scale: float, softcap: float | None, sinks: Tensor | None
) -> dict[str, Any]:
    """What the operators that look at attention are told of a call, by the names of their arguments."""
    return {
        "key_padding_mask": seen.padding,
        "bias": seen.bias,
        "softmax_scale": scale,
        "is_causal": seen.causal,
        "window": None if seen.window is None else seen.sides,
        "softcap": softcap or 0.0,
        "sinks": _readable_sinks(sinks, query),
    }


def _weights(
    query: Tensor, key: Tensor, seen: Visibility, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The weights (B, H, Sq, Sk), without gradient: by the operator, or else by definition."""
    if type(query) is not Tensor or query.shape[-1] > 256:
        return _probabilities(query, key, seen, scale, softcap, sinks)
    return attention_probabilities(query, key, **of_operator(query, seen, scale, softcap, sinks))


def _probabilities(
    query: Tensor, key: Tensor, seen: Visibility, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The weights (B, H, Sq, Sk) by definition; zero for a query that sees nothing, as in the operator."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if seen.bias is not None:
        logits = logits + seen.bias
    mask = _dense_mask(query, seen)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    if sinks is not None:
        column = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1, dtype=exact).nan_to_num(0.0).to(query.dtype)
    return weights if sinks is None else weights[..., :-1]


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    return torch.matmul(weights, value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1))


_logged: set[str] = set()


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Visibility,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    p: float,
) -> Tensor:
    """Shapes that the operator does not take."""
    if softcap or sinks is not None:
        weights = _probabilities(query, key, seen, scale, softcap, sinks)
        return _weigh(torch.dropout(weights, p, p > 0), value)
    reason = f"query and key heads of {query.shape[-1]} and value heads of {value.shape[-1]}"
    if not torch.compiler.is_compiling() and reason not in _logged:
        _logged.add(reason)
        _logger.warning(
            "bigmodel attention does not take %s: torch's scaled_dot_product_attention runs them", reason
        )
    mask = _dense_mask(query, seen)
    if seen.bias is not None:
        mask = seen.bias if mask is None else seen.bias.masked_fill(~mask, float("-inf"))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=p, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


# ------------------------------------------------------------------------------------------------------------
# without padding


def packing_of(padding: Tensor | None) -> blocks.Packing | None:
    """How to pack the batch of a bool (B, S). None where its values may not be looked at, and where a
    sequence starts with padding: a pooler reads that position.
    """
    if padding is None or is_tracing(padding) or not bool(padding[:, 0].all()):
        return None
    return blocks.Packing(padding)


def says_padding(mask: Any) -> bool:
    """Whether a mask says which tokens are padding, whose results are of no use to anybody.

    One of the user's own, of the same four dimensions, says which keys are seen: by all queries, at the
    places of hidden keys too.
    """
    return isinstance(mask, Tensor) and (mask.dim() == 2 or hasattr(mask, _PADDING))


def hides_keys(mask: Any) -> bool:
    """Whether a mask says no more than which keys are hidden from all queries: bool (B or 1, 1, 1, S)."""
    return (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[1:3] == (1, 1)
        and mask.dtype == torch.bool
    )


def packable(mask: Any) -> bool:
    """Whether a mask says nothing but padding and a window to both sides."""
    return hides_keys(mask) or (isinstance(mask, Tensor) and mask.dim() == 3 and mask.shape[1] == 2)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    packing: blocks.Packing,
    scale: float,
    p: float,
    window: int | None = None,
) -> Tensor:
    """Attention of packed tokens, (1, H, tokens, D); the result is (1, tokens, H * D).

    Of a `packable` mask, that of the padded batch, the window counts; `window` is the layer's own, see
    `visibility`.
    """
    side = -1 if mask is None or mask.dim() != 3 else window_of(mask, window) - 1
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    terms = packing.terms(query, key, value, scale, side)
    return blocks.attended(terms, p)[None]


# ------------------------------------------------------------------------------------------------------------
# outputs that the call asks for


def collected() -> Any:
    """Names of the outputs ("hidden_states", "attentions", ...) that this forward collects by hooks."""
    if torch.compiler.is_compiling():
        return (collector.global_var or ()) if collector.compiling else ()
    return collector.get() or ()


def wants_attentions(kwargs: dict[str, Any]) -> bool:
    """Whether somebody looks at this call's probabilities, so that it has to go through `attention_forward`
    on its own: the call, a collected output, or an observer.
    """
    return _returns_attentions(kwargs) or observer() is not None


def _returns_attentions(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    names = collected()
    return "attentions" in names or "cross_attentions" in names


#: Gets the module, query, key, visibility, scale, softcap and sinks of every call of `attend`.
Observer = Callable[[torch.nn.Module, Tensor, Tensor, Visibility, float, float | None, Tensor | None], None]

observing: ContextVar[Observer | None] = ContextVar("bigmodel_attention_observer", default=None)


def observer() -> Observer | None:
    """Who observes this forward; nobody does under torch.compile."""
    return None if torch.compiler.is_compiling() else observing.get()
