"""A token of a generation by a whole model in three calls: embedding, all layers, and the last norm (see
`whole_model`).

Of one token of each sequence, whose keys and values go behind those of a growing cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bigmodel_kernels.transformers import attention_interface, layer_stack, whole_layer, whole_model
from bigmodel_kernels.transformers.blocks import LayerParts


class Model(whole_model.Model):
    """Goes before `layer_stack.Model`; what a family says of its model is in the methods."""

    layout: ClassVar[str] = "linear"
    norm_kind: ClassVar[str] = "layer_norm"
    output: ClassVar[Any]

    def known(self) -> bool:
        """Whether the config is one whose forward is as known."""
        return True

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
        """What goes into the first layer (B, 1, hidden), and the angles of `whole_layer.token`."""
        raise NotImplementedError

    def leave(self, states: Tensor, around: Sequence[Any], told: Any) -> Tensor:
        """The model's result of that of the last layer."""
        raise NotImplementedError

    def at_once(
        self,
        input_ids: Any = None,
        *rest: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        **others: Any,
    ) -> Any:
        cache = attention_interface.cache_of(others)
        if rest or cache is None or not whole_model.plain(self, input_ids, others) or input_ids.shape[1] != 1:
            return None
        if not (self.config.use_cache if use_cache is None else use_cache) or not self.known():
            return None
        length, pad = cache.get_seq_length(), self.config.pad_token_id
        if attention_mask is None:
            if pad is not None:
                return None  # the model's own forward may warn
        elif not whole_model.tokens(attention_mask, (input_ids.shape[0], length + 1)):
            return None
        elif bool(attention_mask.all()):
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
        out = whole_layer.token(states, layers, cached, self.norm_kind, angles)
        if out is None:
            return None
        return self.output(self.leave(out, around, told), cache)

    def _layers(self) -> whole_layer.Layers | None:
        """All layers, with where in a cache their keys are and what `leave` is told."""
        roots = [module for module in self.__dict__["_modules"].values() if module is not None]

        def gather(dtype: torch.dtype) -> whole_layer.Gathered | None:
            around = self.around(dtype)
            if around is None:
                return None
            parts, where = [], []
            for layer in self.stacked():
                found = self.read(layer, dtype)
                if found is None:
                    return None
                parts.append(found[0])
                where.append(found[1])
            return (parts, (where, around[1]), around[0]) if parts else None

        return whole_model.layers_of(self, roots, getattr(self.table(), "weight", None), self.layout, gather)
