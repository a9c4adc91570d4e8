"""Keys and values of a DynamicCache that grow in place.

transformers' cache makes a new tensor of all keys for each token of a generation, and one of all values. Here
a layer's keys are the beginning of a buffer with room for more, and a token is written behind them::

    layer.keys  [ k0 k1 k2 k3 |          room           ]      a view of the first tokens
    layer.keys  [ k0 k1 k2 k3 k4 |         room         ]      a longer view of the same buffer

A layer that slides holds the last tokens alone, which lie behind those that it has dropped; at the end of the
buffer they begin another one::

    layer.keys  [ -- -- k2 k3 k4 |         room         ]

To everybody else the cache is as before: what it holds are tensors of the same shapes and values, and nothing
that was handed out is ever written to, since only the room behind it is. A layer that was cropped, reordered,
copied or given other tensors holds one that is not the last view made here, and gets a buffer of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

#: Room for so many tokens more, or for a share of those that are there.
_LEAST_ROOM, _SHARE = 64, 4


class _Buffers:
    """What a layer's tensors are parts of, and the views that it was given last."""

    __slots__ = ("first", "inference", "keys", "keys_view", "kinds", "room", "values", "values_view")

    def __init__(self, key: Kind, value: Kind, least: int) -> None:
        self.room = least + max(_LEAST_ROOM, least // _SHARE)
        self.first = 0  # of the tokens that the views have
        self.inference = torch.is_inference_mode_enabled()
        self.keys, self.values = (kind.empty(self.room) for kind in (key, value))
        self.keys_view: Tensor | None = None
        self.values_view: Tensor | None = None
        self.kinds = (key.type, value.type)

    @staticmethod
    def of(keys: Tensor, values: Tensor, least: int) -> _Buffers:
        """That begin with what a layer holds."""
        key, value = (Kind(t.shape, t.dtype, t.device) for t in (keys, values))
        buffers = _Buffers(key, value, least)
        buffers.keys[:, :, : keys.shape[2]] = keys
        buffers.values[:, :, : values.shape[2]] = values
        buffers.keys_view, buffers.values_view = keys, values
        return buffers

    def ahead(self) -> tuple[Tensor, Tensor]:
        """From the first token of the views on."""
        if not self.first:
            return self.keys, self.values
        length = self.room - self.first
        return self.keys.narrow(2, self.first, length), self.values.narrow(2, self.first, length)

    def holds(self, keys: Tensor, values: Tensor, key: Kind, value: Kind) -> bool:
        """Whether what a layer has are the views that it was given last, with room for these behind them."""
        return (
            self.keys_view is keys
            and self.values_view is values
            and _lies(keys, self.keys, self.first)
            and _lies(values, self.values, self.first)
            and self.first + keys.shape[2] + key.shape[2] <= self.room
            and self.kinds == (key.type, value.type)
            # a buffer of inference mode must not be changed outside it, nor is another one any use inside
            and self.inference == torch.is_inference_mode_enabled()
        )


_buffers: weakref.WeakKeyDictionary[DynamicLayer, _Buffers] = weakref.WeakKeyDictionary()


class Room(NamedTuple):
    """Where the next tokens of a layer are written: behind the `length` that it holds."""

    keys: Tensor  # from the first that it holds on
    values: Tensor
    length: int
    seen: int  # tokens, with those that it has dropped
    layer: DynamicLayer
    buffers: _Buffers
    #: Where the layer goes, if the cache has not made it yet.
    layers: list[Any] | None = None

    def written(self, new: int) -> tuple[Tensor, Tensor]:
        """All keys and values, with the `new` ones that are there now; the layer then holds them."""
        layer, buffers, end = self.layer, self.buffers, self.length + new
        if not layer.is_initialized:
            if self.layers is not None:
                self.layers.append(layer)
            layer.lazy_initialization(self.keys, self.values)
            _buffers[layer] = buffers
        keys, values = (t.narrow(2, 0, end) for t in (self.keys, self.values))
        held = keys, values
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += new
            drops = end - layer.sliding_window + 1
            if drops > 0:
                buffers.first += drops
                held = keys[:, :, drops:], values[:, :, drops:]
        layer.keys, layer.values = buffers.keys_view, buffers.values_view = held
        return keys, values


class Kind(NamedTuple):
    """Of keys or values that are to come: shape (B, heads, new tokens, head_dim), dtype and device."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    @property
    def type(self) -> tuple[Any, ...]:
        """All but the number of tokens."""
        batch, heads, _, features = self.shape
        return batch, heads, features, self.dtype, self.device

    def empty(self, room: int) -> Tensor:
        batch, heads, _, features = self.shape
        return torch.empty(batch, heads, room, features, dtype=self.dtype, device=self.device)


def append(cache: Any, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor] | None:
    """All keys and values of a layer (B, heads, tokens, head_dim), with these, which the layer then holds; or
    None as `room` gives it.
    """
    if type(key) is not Tensor or type(value) is not Tensor:
        return None
    place = room(cache, index, *(Kind(t.shape, t.dtype, t.device) for t in (key, value)))
    if place is None:
        return None
    new = key.shape[2]
    place.keys.narrow(2, place.length, new).copy_(key)
    place.values.narrow(2, place.length, new).copy_(value)
    return place.written(new)


def room(cache: Any, index: int, key: Kind, value: Kind) -> Room | None:
    """Room for such keys and values in a layer.

    None, and nothing done, where `cache.update` has to do it: other caches and layers, the first tokens of a
    layer, where a gradient may be wanted, and in what is being compiled, whose graphs change no buffers.
    """
    found = rooms(cache, [(index, key, value)])
    return None if found is None else found[0]


def rooms(cache: Any, wanted: Iterable[tuple[int, Kind, Kind]], first: bool = False) -> list[Room] | None:
    """`room` in several layers of a cache, or None if one has none; if `first`, for first tokens too."""
    if (
        type(cache) is not DynamicCache
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or getattr(cache, "offloading", False)
    ):
        return None
    layers: list[Any] = cache.layers
    found, made = [], 0
    for index, key, value in wanted:
        if len(key.shape) != 4 or len(value.shape) != 4:
            return None
        if index < len(layers):
            layer, home = layers[index], None
        elif first and index == len(layers) + made and cache.layer_class_to_replicate is DynamicLayer:
            layer, home, made = DynamicLayer(), layers, made + 1
        else:
            return None
        if not (first or layer.is_initialized):
            return None
        keys, values = (layer.keys, layer.values) if layer.is_initialized else (None, None)
        if layer.is_initialized and (keys is None or values is None):
            return None
        length = 0 if keys is None else keys.shape[2]
        seen = _seen(layer, length)
        if seen is None:
            return None
        if keys is None or values is None:
            buffers = _Buffers(key, value, key.shape[2])
        else:
            known = _buffers.get(layer)
            if known is not None and known.holds(keys, values, key, value):
                buffers = known
            elif _takes(keys, key) and _takes(values, value):
                buffers = _buffers[layer] = _Buffers.of(keys, values, length + key.shape[2])
            else:
                return None
        found.append(Room(*buffers.ahead(), length, seen, layer, buffers, home))
    return found


def _seen(layer: Any, length: int) -> int | None:
    """How many tokens a layer that holds so many has seen; None if it is not as known."""
    if type(layer) is DynamicSlidingWindowLayer:
        recording = getattr(layer, "record_past", False)  # before transformers 5.20 there is none
        if recording or layer.sliding_window < 2:
            return None
        seen: int = layer.cumulative_length
        return seen if length == min(seen, layer.sliding_window - 1) else None
    return length if type(layer) is DynamicLayer else None


def _takes(held: Tensor, new: Kind) -> bool:
    """Whether `torch.cat` of the two would give a tensor of the held one's type and place."""
    if type(held) is not Tensor or held.dim() != 4:
        return False
    batch, heads, length, features = held.shape
    return (
        length > 0
        and (batch, heads, features) == (new.shape[0], new.shape[1], new.shape[3])
        and (held.dtype, held.device) == (new.dtype, new.device)
        and not torch._C._functorch.is_functorch_wrapped_tensor(held)
    )


def _lies(view: Tensor, buffer: Tensor, first: int) -> bool:
    """Whether a view lies where it was made: `data` may have been assigned to it since."""
    start = buffer.data_ptr() + first * buffer.stride(2) * buffer.element_size()
    return view.data_ptr() == start and view.stride() == buffer.stride()
