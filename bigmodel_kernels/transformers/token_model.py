"""A token of a generation by a whole model in three calls: embedding, all layers, and the last norm (see
`whole_model`).

Of one token of each sequence, whose keys and values go behind those of a growing cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigmodel_kernels.ops.linear.native import empty, packed
from bigmodel_kernels.ops.native_library import contiguous
from bigmodel_kernels.transformers import attention_interface, checks, layer_stack, whole_layer, whole_model
from bigmodel_kernels.transformers.blocks import LayerParts
from bigmodel_kernels.transformers.families import Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear


class Model(whole_model.Model):
    """Goes before `layer_stack.Model`; what a family says of its model is in the methods."""

    layout: ClassVar[str] = "linear"
    how: ClassVar[whole_layer.How] = whole_layer.How()
    output: ClassVar[Any]

    def known(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether the config is one whose forward is as known. Warns of what that would warn of."""
        raise NotImplementedError

    def table(self) -> Any:
        """The embedding of words."""
        raise NotImplementedError

    def read(self, layer: Any, dtype: torch.dtype | None) -> tuple[LayerParts, layer_stack.Where] | None:
        """A layer's parts, and where in a cache its keys are; None if it does not run as one of all."""
        raise NotImplementedError

    def around(self, dtype: torch.dtype) -> tuple[list[whole_layer.Around], Any] | None:
        """What is around the layers, and what `leave` is told beside; None if it is not as known."""
        raise NotImplementedError

    def enter(self, ids: Tensor, positions: Tensor, around: Sequence[Any]) -> tuple[Tensor, Any]:
        """What goes into the first layer (B, 1, hidden), and the angles of `whole_layer.tokens`."""
        raise NotImplementedError

    def leave(self, states: Tensor, around: Sequence[Any], told: Any) -> Tensor:
        """The model's result of that of the last layer."""
        raise NotImplementedError

    def at_once(self, *args: Any, **kwargs: Any) -> Any:
        found = self.states(*args, **kwargs)
        return None if found is None else self.output(*found)

    def states(
        self,
        input_ids: Any = None,
        *rest: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Any] | None:
        """The model's result (B, 1, hidden), and the cache."""
        cache = attention_interface.cache_of(others)
        if rest or cache is None or not whole_model.plain(self, input_ids, others) or input_ids.shape[1] != 1:
            return None
        if not (self.config.use_cache if use_cache is None else use_cache):
            return None
        length = cache.get_seq_length()
        if attention_mask is not None and not whole_model.masks_tokens(
            attention_mask, (input_ids.shape[0], length + 1)
        ):
            return None
        if not self.known(input_ids, attention_mask):
            return None
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        layers = self._layers()
        around = None if layers is None else layers.around()
        if layers is None or around is None:
            return None
        if position_ids is None:
            position_ids = torch.full((1, 1), length)
        where, told = layers.given
        try:
            positions = position_ids.expand(input_ids.shape).contiguous()
            states, angles = self.enter(input_ids.contiguous(), positions, around)
        except RuntimeError:
            return None  # the model's own forward says what is wrong with the ids
        cached = [each.within(cache, attention_mask) for each in where]
        out = whole_layer.tokens(states, layers, cached, self.how, [] if angles is None else [angles])
        return None if out is None else (self.leave(out, around, told), cache)

    def _layers(self) -> whole_layer.Layers | None:
        """All layers, with where in a cache their keys are and what `leave` is told."""
        roots = [module for module in self.__dict__["_modules"].values() if module is not None]

        def gather(dtype: torch.dtype) -> whole_layer.Gathered | None:
            around, layers = self.around(dtype), self.stacked()
            found = layer_stack.read_all(layers, dtype, self.read) if layers else None
            if around is None or found is None:
                return None
            return found[0], (found[1], around[1]), around[0]

        like = getattr(self.table(), "weight", None)
        return whole_model.layers_of(self, roots, like, self.layout, "cpu_layers", gather)


class LanguageModel(whole_model.Model):
    """A model with the product of its vocabulary behind it; goes before the class that it stands for."""

    #: The attribute with the model.
    holds: ClassVar[str] = "model"
    output: ClassVar[Any]

    def at_once(self, *args: Any, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        modules = self.__dict__["_modules"]
        model, head = modules.get(self.holds), modules.get("lm_head")
        if not isinstance(model, Model) or labels is not None or type(logits_to_keep) is not int:
            return None
        if logits_to_keep < 0 or not checks.intact(self, type(self)) or not self.config.return_dict:
            return None
        like = getattr(model.table(), "weight", None)
        held = checks.parameters(head, BigmodelLinear, getattr(like, "dtype", torch.float32))
        if held is None or not held[0].is_cpu or empty(held[0]):
            return None
        found = model.states(*args, **kwargs)
        if found is None:
            return None
        states, cache = found
        logits = torch.ops.bigmodel.cpu_linear.default(
            *(states, packed([held[0]], "linear"), contiguous(held[1]), "none", None, None, None, 0.0)
        )
        return self.output(None, logits, cache)  # whose name is another before transformers 5.24


def rule(form: type[LanguageModel]) -> Rule:
    """Lets a token of a generation go past the forwards of model and language model."""
    return Rule(form.__bases__[-1], form, (), lambda model: None, note="a token in four calls")
