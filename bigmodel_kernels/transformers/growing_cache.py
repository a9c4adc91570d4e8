"""Keys and values of a DynamicCache that grow in place.

transformers' cache makes a new tensor of all keys for each token of a generation, and one of all values. Here
a layer's keys are the beginning of a buffer with room for more, and a token is written behind them::

    layer.keys  [ k0 k1 k2 k3 |          room           ]      a view of the first tokens
    layer.keys  [ k0 k1 k2 k3 k4 |         room         ]      a longer view of the same buffer

To everybody else the cache is as before: what it holds are tensors of the same shapes and values, and nothing
that was handed out is ever written to, since only the room behind it is. A layer that was cropped, reordered,
copied or given other tensors holds one that is not the last view made here, and gets a buffer of its own.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

#: Room for so many tokens more, or for a share of those that are there.
_LEAST_ROOM, _SHARE = 64, 4


class _Buffers:
    """What a layer's tensors are the beginnings of, and the views that it was given last."""

    __slots__ = ("inference", "keys", "keys_view", "room", "values", "values_view")

    def __init__(self, keys: Tensor, values: Tensor, least: int) -> None:
        self.room = least + max(_LEAST_ROOM, least // _SHARE)
        self.inference = torch.is_inference_mode_enabled()
        self.keys, self.values = (_with_room(t, self.room) for t in (keys, values))
        self.keys_view, self.values_view = keys, values


_buffers: weakref.WeakKeyDictionary[DynamicLayer, _Buffers] = weakref.WeakKeyDictionary()


def append(cache: Any, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor] | None:
    """All keys and values of a layer (B, heads, tokens, head_dim), with these, which the layer then holds.

    None, and nothing done, where `cache.update` has to do it: other caches and layers, the first tokens of a
    layer, where a gradient may be wanted, and in what is being compiled, whose graphs change no buffers.
    """
    if (
        type(cache) is not DynamicCache
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or getattr(cache, "offloading", False)
        or index >= len(cache.layers)
    ):
        return None
    layer = cache.layers[index]
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return None
    held_keys, held_values = layer.keys, layer.values
    if held_keys is None or held_values is None or held_keys.dim() != 4 or not held_keys.shape[2]:
        return None
    if not (_fits(key, held_keys) and _fits(value, held_values)):
        return None
    length, new = held_keys.shape[2], key.shape[2]
    buffers = _buffers.get(layer)
    if (
        buffers is None
        or buffers.keys_view is not held_keys
        or buffers.values_view is not held_values
        or length + new > buffers.room
        # a buffer of inference mode must not be changed outside it, nor is another one any use inside
        or buffers.inference != torch.is_inference_mode_enabled()
    ):
        buffers = _buffers[layer] = _Buffers(held_keys, held_values, length + new)
    buffers.keys.narrow(2, length, new).copy_(key)
    buffers.values.narrow(2, length, new).copy_(value)
    layer.keys = buffers.keys_view = buffers.keys.narrow(2, 0, length + new)
    layer.values = buffers.values_view = buffers.values.narrow(2, 0, length + new)
    return layer.keys, layer.values


def _fits(new: Tensor, held: Tensor) -> bool:
    """Whether `torch.cat` would give a tensor of the held one's type and place."""
    return (
        type(new) is type(held) is Tensor
        and new.dim() == 4
        and new.shape[:2] == held.shape[:2]
        and new.shape[3] == held.shape[3]
        and new.dtype == held.dtype
        and new.device == held.device
        and not torch._C._functorch.is_functorch_wrapped_tensor(held)
    )


def _with_room(held: Tensor, room: int) -> Tensor:
    batch, heads, length, features = held.shape
    buffer = held.new_empty(batch, heads, room, features)
    buffer[:, :, :length] = held
    return buffer
