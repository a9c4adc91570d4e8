"""Encoders that loop over their layers in a forward of their own (ModernBERT, BART, ...), without padding.

The form of the encoder says by an argument of each layer which tokens are real. The first layer that runs
packs them into one row of tokens, (1, tokens, hidden), the others find them so, and the encoder puts the
result back, with zeros for the padding. It packs where it may look at the mask (not under torch.compile),
each sequence starts with a real token, nobody asks for hidden states or attentions, and all layers are
patched and without hooks. A layer whose own code has to run gets its states with the padding, by `own_code`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from bigmodel_kernels.transformers import attention_interface, blocks, checks
from bigmodel_kernels.transformers.autoregister import NAME
from bigmodel_kernels.transformers.families import ChildRule, Rule
from bigmodel_kernels.transformers.generic import Form, stands_for

#: The argument of a layer, a `blocks.Packing`.
ARGUMENT = "bigmodel_packing"

NOTE = "runs its layers without padding"


class Encoder(Form):
    """The model's own forward, around layers on packed tokens.

    The class keeps the name and the signature of the one that it stands for, and what that can record.
    """

    #: False under a head whose result depends on what stands at padding.
    packs: ClassVar[bool] = True
    #: Whether layers have windows: they count tokens, so that a sequence may have no gaps.
    windows: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls.__bases__[-1], Form):
            return
        original: Any = next(base for base in cls.__mro__ if not issubclass(base, Form))

        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            packing = self._packing(args, kwargs)
            if packing is None:
                return original.forward(self, *args, **kwargs)
            out = original.forward(self, *args, **kwargs, **{ARGUMENT: packing})
            if isinstance(out, tuple):
                return packing.dense(out[0]), *out[1:]
            out.last_hidden_state = packing.dense(out.last_hidden_state)
            return out

        cls.forward = forward  # type: ignore[method-assign]
        stands_for(original)(cls)

    def _packing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> blocks.Packing | None:
        """How a batch is packed; None for one that is not."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if (
            not self.packs
            or self.config._attn_implementation != NAME  # else masks are dense
            or not isinstance(mask, Tensor)
            or mask.dim() != 2
            or attention_interface.is_tracing(mask)
            or any(self._wants(kwargs, name) for name in ("output_hidden_states", "output_attentions"))
            or attention_interface.collected()
            or attention_interface.wants_attentions(kwargs)
            or checks.watched_globally()
            or not all(checks.intact(part, type(part)) for part in self.layers.modules())
            or not all(type(layer) in self.kin.forms.values() for layer in self.layers)
        ):
            return None
        padding = mask.bool()
        begins = padding[:, 1:] & ~padding[:, :-1]  # real tokens behind padding
        if bool(padding.all()) or (self.windows and bool(begins.any())):
            return None
        return attention_interface.packing_of(padding)

    def _wants(self, kwargs: dict[str, Any], name: str) -> bool:
        given = kwargs.get(name)
        return bool(getattr(self.config, name, False) if given is None else given)


def own_code(
    forward: Callable[..., Any], states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A layer's own forward, on states that may be packed."""
    packing = kwargs.pop(ARGUMENT, None)
    if packing is None:
        return forward(states, *args, **kwargs)
    return packing.rows(forward(packing.dense(states), *args, **kwargs))


def rows(states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The states as a fused layer takes them: packed if the encoder packs."""
    packing = kwargs.get(ARGUMENT)
    return states if packing is None else packing.rows(states)


# ------------------------------------------------------------------------------------------------------------
# what a family says


def reason_for_layers(
    encoder: nn.Module, cls: type[nn.Module], form: type, check: Callable[[Any], str | None], so: str
) -> str | None:
    """Why not all layers, each a `cls`, can run fused, and what follows from that."""
    for name, part in encoder.named_modules():
        if isinstance(part, cls):
            why = None if type(part) is form else checks.reason_for_class(part, cls)
            why = why or check(part)
            if why is not None:
                return f"not all of its layers can be fused, so {so} ({name}: {why})"
    return None


def check(
    layer: type[nn.Module], kin: Any, check_layer: Callable[[Any], str | None], encoder: Any
) -> str | None:
    """For the encoder of these kin, whose layers are of the class `layer`."""
    return reason_for_layers(encoder, layer, kin.forms[layer], check_layer, "batches keep their padding")


def keeps_padding(
    model: type[nn.Module],
    attribute: str,
    encoder: type[nn.Module],
    patched: type[nn.Module],
    check: Callable[[Any], str | None],
) -> ChildRule:
    """For a head that mixes positions: the encoder at `attribute` becomes a form whose `packs` is False."""
    note = "runs its layers with the padding in: the head's result depends on all positions"
    return ChildRule(model, attribute, encoder, patched, (), check, note)


def rule(
    encoder: type[nn.Module], layer: type[nn.Module], kin: Any, check_layer: Callable[[Any], str | None]
) -> Rule:
    return Rule(encoder, kin.forms[encoder], (), partial(check, layer, kin, check_layer), NOTE)
