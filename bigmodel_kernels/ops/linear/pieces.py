"""Rows of a weight as weights of their own: for a model that has in one what a call reads as several."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Pieces(NamedTuple):
    """Of a weight that lay there: as many equal ones, from its first row on."""

    place: tuple[Any, ...]
    tensors: tuple[Tensor, ...]


_pieces = WeakTensorKeyDictionary()


def pieces_of(weight: Tensor, count: int) -> tuple[Tensor, ...]:
    """The same tensors each time, while the weight lies where it lies, so that what is packed is found."""
    place = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, count)
    known: _Pieces | None = _pieces.get(weight)
    if known is None or known.place != place:
        # Not of the parameter itself, which would keep it alive.
        known = _pieces[weight] = _Pieces(place, weight.detach().chunk(count))
    return known.tensors


def known_pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """What `pieces_of` gave last; none if it has not been asked."""
    known: _Pieces | None = _pieces.get(weight)
    return () if known is None else known.tensors
