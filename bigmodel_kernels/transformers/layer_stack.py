"""All layers of a model in one call, for a prompt that is not long and for a token of a generation.

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
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bigmodel_kernels.transformers import attention_interface, checks, whole_layer
from bigmodel_kernels.transformers.blocks import LayerParts
from bigmodel_kernels.transformers.families import Rule
from bigmodel_kernels.transformers.generic import Form, NamedForm

#: What is told of a layer beside its parts.
Told = TypeVar("Told")


class Stack:
    """The layers of a model whose forward is running."""

    __slots__ = ("given", "layers", "mask", "model", "next")

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], mask: Any) -> None:
        self.model, self.layers = model, layers
        self.mask = mask  # that the model was given
        self.given: Tensor | None = None
        self.next = 0  # that hands it on

    def hands_on(self, layer: nn.Module, x: Any) -> bool:
        """Whether the layer's work on x has been done: x is the result already."""
        if self.given is None or self.given is not x or self.layers[self.next] is not layer:
            return False
        self.next += 1
        if self.next == len(self.layers):
            self.given = None
        return True


class _Running(threading.local):
    stack: Stack | None = None


_running = _Running()


def current() -> Stack | None:
    """That of the model that this thread is in; none under torch.compile, which traces each layer."""
    return None if torch.compiler.is_compiling() else _running.stack


def result(
    layer: nn.Module, kwargs: dict[str, Any], all_layers: Callable[[Stack], Tensor | None]
) -> Tensor | None:
    """The result of all layers, if this is the first, nobody asks for what is between, and `all_layers` can
    say.
    """
    stack = current()
    if stack is None or len(stack.layers) < 2 or stack.layers[0] is not layer:
        return None
    if attention_interface.collected() or attention_interface.wants_attentions(kwargs):
        return None
    stack.given, stack.next = all_layers(stack), 1
    return stack.given


def layers_of(
    stack: Stack,
    x: Tensor,
    layout: str,
    read: Callable[[Any, torch.dtype | None], tuple[LayerParts, Told] | None],
) -> whole_layer.Layers | None:
    """All layers as `read` says of each, what it tells beside as `given`; None if it has nothing of one."""

    def gather() -> tuple[list[LayerParts], list[Told]] | None:
        return read_all(stack.layers, checks.dtype_of(x), read)

    return whole_layer.layers_of(stack.model, stack.layers, x, layout, gather)


def read_all(
    layers: Sequence[nn.Module],
    dtype: torch.dtype | None,
    read: Callable[[Any, torch.dtype | None], tuple[LayerParts, Told] | None],
) -> tuple[list[LayerParts], list[Told]] | None:
    """What `read` says of each of some layers; None if it has nothing of one."""
    parts, told = [], []
    for layer in layers:
        found = read(layer, dtype)
        if found is None:
            return None
        parts.append(found[0])
        told.append(found[1])
    return parts, told


@contextmanager
def running(model: nn.Module, layers: Sequence[nn.Module], mask: Any) -> Iterator[None]:
    before = _running.stack
    _running.stack = Stack(model, layers, mask)
    try:
        yield
    finally:
        _running.stack = before


class Where(NamedTuple):
    """Which of a cache's layers a layer attends to, and how."""

    layer: int
    kv_heads: int
    scale: float
    causal: bool = True  # if a call does not say
    window: int | None = None
    turned: bool = True  # by a rotary embedding, if there is one

    @staticmethod
    def of(layer: int, parts: LayerParts, scale: float, attention: Any, queries: int | None = None) -> Where:
        """`queries` share a key where one projection has all three."""
        qkv: tuple[Any, ...] = parts.qkv
        values = qkv[-(len(qkv) // 3 or 1) :]  # or all
        heads = sum(part.weight.shape[0] for part in values) // parts.head_dim
        return Where(
            layer,
            heads if len(qkv) > 1 or queries is None else heads // (queries + 2),
            scale,
            bool(getattr(attention, "is_causal", True)),
            attention_interface.window_of_masks(attention),
            getattr(attention, "use_rope", True),  # SmolLM3 has layers without
        )

    def within(self, cache: Any, mask: Tensor | None) -> whole_layer.Cached:
        return whole_layer.Cached(
            cache, self.layer, self.kv_heads, mask, self.scale, self.window, self.turned
        )


def within(
    stack: Stack, where: Sequence[Where], cache: Any, mask: Tensor | None
) -> list[whole_layer.Cached] | None:
    """What the layers attend to; None if that is not known of all from what the first was given."""
    windows = [each.window for each in where]
    masks = [(mask, windows[0])]
    if any(window is not None for window in windows):
        given = stack.mask
        if isinstance(given, dict):
            # By an outer model, or the caller: a layer has the window that its mask has.
            types = list(getattr(stack.model.config, "layer_types", None) or ())[: len(where)]
            of_types = [given.get(kind) for kind in types]
            if len(of_types) < len(where) or of_types[0] is not mask:
                return None
            masks = list(zip(of_types, windows, strict=True))
            windows = [None if m is None or m.dim() != 3 else window for m, window in masks]
        elif given is not None and (type(given) is not Tensor or given.dim() != 2):
            return None
        elif windows[0] is not None and len(set(windows)) > 1 and given is not None and not bool(given.all()):
            masks = [(given, None)]  # of which the first layer may no longer see all
    keys = {pair: _keys_seen(*pair) for pair in masks}
    if any(told is not None and seen is None for (told, _), seen in keys.items()):
        return None
    return [
        each._replace(window=window).within(cache, keys[masks[i % len(masks)]])
        for i, (each, window) in enumerate(zip(where, windows, strict=True))
    ]


def _keys_seen(mask: Tensor | None, window: int | None) -> Tensor | None:
    """Which keys (B, keys) are seen by a mask that says no more, or that they are within this window."""
    if mask is None or mask.dim() == 2:
        return mask
    if mask.dim() == 3 and mask.shape[1] == 1 and attention_interface.window_of(mask, window) == window:
        return mask[:, 0]
    return mask[:, 0, 0] if attention_interface.hides_keys(mask) else None


def causal(x: Tensor, where: Sequence[Where], told: bool | None) -> bool:
    """Whether no token of x (B, tokens, hidden) sees those behind it, as a call has `told` or else its layers
    have it.
    """
    if x.shape[1] == 1:
        return True
    return all(each.causal for each in where) if told is None else told


class Model(NamedForm):
    """A model whose forward runs a stack; goes before the class that it stands for, whose forward it keeps.

    Not in training mode, where a model may leave layers out.
    """

    #: The attribute with the layers; the forward calls the first `config.num_hidden_layers` of them at least.
    at: ClassVar[str] = "layers"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph = torch.compiler.is_compiling() or torch.is_grad_enabled()
        if graph or self.training or "forward" in self.__dict__ or wants_states(self, kwargs):
            return super().__call__(*args, **kwargs)
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        with running(self, self.stacked(), mask):
            return super().__call__(*args, **kwargs)

    def stacked(self) -> list[nn.Module]:
        """The layers that its forward calls."""
        layers = getattr(self, self.at).__dict__["_modules"].values()
        return list(layers)[: self.config.num_hidden_layers]


def wants_states(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the states between layers are asked for: some models collect them without a hook."""
    wanted = kwargs.get("output_hidden_states")
    return bool(model.config.output_hidden_states if wanted is None else wanted)


class Layer(Form):
    """A layer of such a model; goes before the class that it stands for.

    If its work on x has been done it is not so much as called: nothing watches it then, and what torch does
    around a call takes longer than to hand x on.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = current()
        if stack is not None:
            x: Any = args[0] if args else kwargs.get("hidden_states")
            if stack.hands_on(self, x):
                return self.gives(x)
        return super().__call__(*args, **kwargs)

    def gives(self, out: Tensor) -> Any:
        """What its forward returns."""
        return out


#: Of a decoder and of an encoder.
TOKEN_NOTE, ROWS_NOTE = "its layers in one call for a token", "its layers in one call on few rows"


def rule(
    original: type[nn.Module],
    form: type[Model],
    check: Callable[[Any], str | None] = lambda model: None,
    note: str = TOKEN_NOTE,
) -> Rule:
    """Lets the first layer do the work of all, where `check` does not say why not."""

    def check_all(model: Any) -> str | None:
        kind = type(getattr(model, form.at))
        return check(model) if kind is nn.ModuleList else f"its layers are in a {kind.__name__}"

    return Rule(original, form, (), check_all, note=note)
