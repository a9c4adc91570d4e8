"""All layers of a model in one call, for a token of a generation.

All weights of a layer go through the caches for each token, and what Python does for the next layer has to
come from memory again: code and data, for each layer as if it were the first. So a model's first layer does
the work of all, if it can read them all, in one stretch of Python and one call, and the others hand on what
it gave::

    model(...)                      `running` says so while the model's own code runs
      h[0](x)        -> y           all layers; y is remembered
      h[1](y)        -> y           what was given is this very tensor
      ...

For models whose forward calls all of its layers, one behind the other and with the same arguments. A layer
that is watched (hooks, collected hidden states) is never run by another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Stack:
    """The layers of a model whose forward is running."""

    __slots__ = ("given", "layers", "next")

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.given: Tensor | None = None
        self.next = 0  # that hands it on

    def hands_on(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether the layer's work on x has been done: x is the result already."""
        if self.given is not x or self.layers[self.next] is not layer:
            return False
        self.next += 1
        if self.next == len(self.layers):
            self.given = None
        return True

    def run(
        self, layer: nn.Module, all_layers: Callable[[Sequence[nn.Module]], Tensor | None]
    ) -> Tensor | None:
        """The result of all of them, if this is the first and `all_layers` can say."""
        if len(self.layers) < 2 or self.layers[0] is not layer:
            return None
        self.given, self.next = all_layers(self.layers), 1
        return self.given


class _Running(threading.local):
    stack: Stack | None = None


_running = _Running()


def current() -> Stack | None:
    """That of the model that this thread is in; none under torch.compile, which traces each layer."""
    return None if torch.compiler.is_compiling() else _running.stack


@contextmanager
def running(layers: Any) -> Iterator[None]:
    before = _running.stack
    _running.stack = Stack(layers)
    try:
        yield
    finally:
        _running.stack = before


def check(attribute: str) -> Callable[[Any], str | None]:
    """Whether a model's layers are where its forward looks for them."""

    def reason(model: Any) -> str | None:
        kind = type(getattr(model, attribute))
        return None if kind is nn.ModuleList else f"its {attribute} are in a {kind.__name__}"

    return reason


class Model(nn.Module):
    """A model whose forward runs a stack; goes before the class that it stands for, whose forward it keeps."""

    def layers_of(self) -> Sequence[nn.Module]:
        """Those that its forward calls, in their order."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or "forward" in self.__dict__:
            return super().__call__(*args, **kwargs)
        with running(self.layers_of()):
            return super().__call__(*args, **kwargs)
