"""A small call of every public operator, for asking which backend would run it, or seeing that one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def example(op: str, dtype: torch.dtype, device: torch.device | str, head_dim: int = 64) -> Arguments:
    """Positional and named arguments of the public function, of zeros.

    Raises ValueError for an operator that is not known.
    """
    if op not in _EXAMPLES:
        raise ValueError(f"op={op!r} is unknown; allowed are {', '.join(OPERATORS)}")
    return _EXAMPLES[op](_Zeros(dtype, device, head_dim))


class _Zeros:
    def __init__(self, dtype: torch.dtype, device: torch.device | str, head_dim: int) -> None:
        self.dtype, self.device, self.head_dim = dtype, device, head_dim

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def heads(self, rows: int = 4) -> torch.Tensor:
        return self(1, 2, rows, self.head_dim)

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def _decode(new: _Zeros) -> Arguments:
    length = torch.ones(1, dtype=torch.int32, device=new.device)
    return (new.heads(1), new.heads(8), new.heads(8), length), {}


def _rotary(new: _Zeros) -> Arguments:
    pairs = new.head_dim // 2
    query, angles = new(1, 2, 4, 2 * pairs), new(4, pairs)
    return (query, query, angles, angles), {}


_EXAMPLES: dict[str, Callable[[_Zeros], Arguments]] = {
    "attention": lambda new: ((new.heads(), new.heads(), new.heads()), {}),
    "linear": lambda new: ((new(4, 64), new(64, 64), new(64)), {}),
    "feed_forward": lambda new: (
        (new(4, 64), new(128, 64), new(128), new(64, 128), new(64)),
        {"activation": "gelu"},
    ),
    "layer_norm": lambda new: ((new(4, 64), new(64), new(64)), {}),
    "rms_norm": lambda new: ((new(4, 64), new(64)), {}),
    "embedding": lambda new: ((new.ids(1, 4), new(8, 64)), {}),
    "rotary": _rotary,
    "attention_decode": _decode,
    "attention_statistics": lambda new: ((new.heads(), new.heads()), {}),
    "attention_probabilities": lambda new: ((new.heads(), new.heads()), {}),
    "linear_cross_entropy": lambda new: ((new(4, 64), new(8, 64), new.ids(4)), {}),
}
OPERATORS = tuple(_EXAMPLES)
