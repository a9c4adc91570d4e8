"""A weight that exists only as the compiled library has packed it: `release_weights` puts it in the place of
a parameter, whose memory it gives back.

It has the shape and dtype of the parameter. The library's operators read the packed copy; whatever else is
done with it gets the weight itself, unpacked for the occasion: `state_dict`, pickles and `copy.deepcopy` of a
model are what they were. It cannot be written to; assigning `data`, as `.to(dtype)` of a module does, makes a
plain parameter of it.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: csrc/kernels.h, PackedHeader: magic, in_features, out_features, dtype, columns per panel, pairs along k.
_HEADER = struct.Struct("<Qqqiii")
_HEADER_BYTES = 128


class Place(NamedTuple):
    """Where a weight lies in a packed one, and how that is laid out."""

    layout: str
    first: int  # column
    of: int  # all columns
    shape: tuple[int, ...]
    trainable: bool  # whether the parameter required a gradient
    panel: int  # columns to a panel
    pairs: bool  # neighbours along in_features lie together


def layout_of(packed: Tensor) -> tuple[int, bool]:
    """Columns to a panel of a packed weight, and whether it is of pairs."""
    *_, panel, pairs = _HEADER.unpack(bytes(packed[: _HEADER.size].tolist()))
    return panel, bool(pairs)


class PackedWeight(Tensor):
    """See the top of this file. `packed` is uint8, by `cpu_pack_weight`; other weights may lie in it too."""

    packed: Tensor
    place: Place
    # Attributes are read at each call, and would each go through Python.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: Tensor, place: Place, dtype: torch.dtype) -> PackedWeight:
        self: PackedWeight = Tensor._make_wrapper_subclass(cls, place.shape, dtype=dtype)
        self.packed, self.place = packed, place
        return self

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        # Torch would change the shape and dtype alone, and leave an object of this class.
        torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.place.trainable))

    @property
    def columns(self) -> int:
        """How many of the packed columns are this weight's."""
        return self.place.shape[1 if self.place.layout == "conv1d" else 0]

    def unpacked(self) -> Tensor:
        """The weight as it was given, in memory of its own."""
        layout, first, of, shape, _, panel, pairs = self.place
        features = shape[0 if layout == "conv1d" else 1]
        panels = (of + panel - 1) // panel
        body = self.packed[_HEADER_BYTES:].view(self.dtype)
        if pairs:
            rows = body.view(panels, -1, panel, 2).permute(1, 3, 0, 2).reshape(-1, panels * panel)[:features]
        else:
            rows = body.view(panels, features, panel).transpose(0, 1).reshape(features, panels * panel)
        part = rows[:, first : first + self.columns]
        return (part if layout == "conv1d" else part.T).contiguous()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed"], (self.place, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> PackedWeight:
        return PackedWeight(inner["packed"], *context)

    def _stable_hash_for_caching(self) -> str:
        return repr((self.place, self.dtype))

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.dtype}, {self.packed.numel()} bytes packed)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return frozen(PackedWeight(self.packed, self.place, self.dtype))  # nobody writes to it

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.nn.Parameter, (self.unpacked(), self.place.trainable)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            (given,) = args
            return PackedWeight(given.packed, given.place, given.dtype)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, PackedWeight) and argument.alias_info and argument.alias_info.is_write:
                raise RuntimeError(
                    f"{func} would write to a released weight {tuple(value.shape)}; "
                    "call bigmodel_kernels.restore_weights(model) first"
                )
        return func(
            *pytree.tree_map_only(PackedWeight, PackedWeight.unpacked, args),
            **pytree.tree_map_only(PackedWeight, PackedWeight.unpacked, kwargs),
        )


def frozen(weight: PackedWeight) -> torch.nn.Parameter:
    """As a parameter of a module."""
    return torch.nn.Parameter(weight, requires_grad=False)


def whole(weights: Any) -> Tensor | None:
    """The packed tensor that holds just these weights side by side, if there is one."""
    first = weights[0]
    if type(first) is not PackedWeight:
        return None
    packed, column = first.packed, 0
    for weight in weights:
        if type(weight) is not PackedWeight or weight.packed is not packed or weight.place.first != column:
            return None
        column += weight.columns
    return packed if column == first.place.of else None
