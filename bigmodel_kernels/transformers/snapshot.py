"""What modules hold, seen again at a later call.

A fused call reads the parameters of modules that are not called themselves, so it has to see each time that
every one of them is still what it takes it for. For all layers of a model that takes as long as one of them
computes on a few tokens. But modules seldom change between two calls: it is enough to see that they hold the
very things that they held when they were looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

#: Hooks that pass a fused call by.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """Of `roots` and all modules within them.

    Compared by identity are the classes, the submodules, the hooks, the parameters and all other attributes
    (training mode, probabilities, functions); not what is changed inside an attribute, and of parameters
    their dtype and device, not their contents. Parameters are not kept alive; the modules are, until a
    snapshot of others takes the place of this one.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._classes = list(map(type, self._modules))
        states = [module.__dict__ for module in self._modules]
        hooks = [state[name] for state in states for name in _HOOKS]
        parameters = [state["_parameters"] for state in states]
        self._empty = [held for held in (*hooks, *parameters) if not held]
        self._dicts = [*states, *(state["_modules"] for state in states), *filter(None, hooks)]
        self._sizes = list(map(len, self._dicts))
        self._held = list(_values(self._dicts))
        self._parameter_dicts = list(filter(None, parameters))
        self._parameter_sizes = list(map(len, self._parameter_dicts))
        self._parameters = [_reference(p) for p in _values(self._parameter_dicts)]

    def parameters(self, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor | None] | None:
        """All parameters, if nothing has changed and they are what is asked for; else None."""
        held = self.held()
        if held is None or any(t is not None and (t.dtype is not dtype or t.device != device) for t in held):
            return None
        return held

    def held(self) -> Sequence[Tensor | None] | None:
        """All parameters, of whatever dtype and device, if nothing has changed; else None."""
        if (
            any(self._empty)
            or not all(map(is_, map(type, self._modules), self._classes))
            or list(map(len, self._dicts)) != self._sizes
            or not all(map(is_, _values(self._dicts), self._held))
            or list(map(len, self._parameter_dicts)) != self._parameter_sizes
        ):
            return None
        held = list(_values(self._parameter_dicts))
        for tensor, reference in zip(held, self._parameters, strict=True):
            if tensor is None:
                if reference is not _nothing:  # one that has died gives None as well
                    return None
            elif reference() is not tensor:
                return None
        return held


def _values(dicts: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _nothing() -> None:
    """For a parameter that is not there."""


def _reference(tensor: Tensor | None) -> Any:
    return _nothing if tensor is None else weakref.ref(tensor)
