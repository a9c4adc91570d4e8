"""What the forms of whole models share, that run past the model's own forward.

On a short text, and for a token of a generation, a model's own forward, with defaults of its config, a mask
and modules one in another, takes a tenth of the time: each weight goes through the caches, so that what
Python needs for the next step has to come from memory again. A call that asks for the model's result alone
goes past it, in three calls: to the first layer, all layers, and from the last one (`encoder_model`,
`token_model`). Every other call takes it, and so does every call of a model whose modules are not as known;
the results are the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_kernels.ops.registration import nobody_listens
from bigmodel_kernels.transformers import attention_interface, checks, whole_layer
from bigmodel_kernels.transformers.generic import NamedForm
from bigmodel_kernels.transformers.snapshot import Snapshot

#: What cannot change the result of a call that `plain` has looked at.
_INDIFFERENT = frozenset(("return_dict", "use_cache", "cache", "past_key_values"))


class Model(NamedForm):
    """Goes before the class that it stands for, whose forward it keeps."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph = torch.compiler.is_compiling() or torch.is_grad_enabled()
        found = None if graph or self.training else self.at_once(*args, **kwargs)
        return super().__call__(*args, **kwargs) if found is None else found

    def at_once(self, *args: Any, **kwargs: Any) -> Any:
        """The result, or None, and nothing done, where the model's own forward has to make it."""
        raise NotImplementedError


def plain(model: nn.Module, input_ids: Any, others: dict[str, Any]) -> bool:
    """Whether a call, with these arguments beside those that the caller knows, is for the result alone, and
    nobody watches it. The cache is for the caller to look at.
    """
    config: Any = model.config
    return (
        type(input_ids) is Tensor
        and input_ids.dtype is torch.int64
        and input_ids.is_cpu
        and input_ids.dim() == 2
        and input_ids.numel() > 0
        and all(v is None or v is False or name in _INDIFFERENT for name, v in others.items())
        and others.get("return_dict") is not False
        and config.return_dict
        and not config.output_hidden_states
        and not config.output_attentions
        and checks.intact(model, type(model))
        and not checks.watched_globally()
        and not attention_interface.collected()
        and attention_interface.observer() is None
        and nobody_listens("cpu")
    )


def masks_tokens(mask: Any, shape: Sequence[int]) -> bool:
    """Whether `mask` is a plain one of tokens, one for each of this shape."""
    return type(mask) is Tensor and mask.is_cpu and mask.shape == shape


class _Strange:
    """A model that was seen not to be as known, as it was."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._snapshot = Snapshot(roots)
        self._dtypes = self._now()

    def still(self) -> bool:
        return self._dtypes is not None and self._now() == self._dtypes

    def _now(self) -> list[Any] | None:
        held = self._snapshot.held()
        return None if held is None else [None if t is None else (t.dtype, t.device) for t in held]


_strange: weakref.WeakKeyDictionary[nn.Module, _Strange] = weakref.WeakKeyDictionary()


def layers_of(
    model: nn.Module,
    roots: Sequence[nn.Module],
    like: Any,
    layout: str,
    op: str,
    gather: Callable[[torch.dtype], whole_layer.Gathered | None],
) -> whole_layer.Layers | None:
    """All layers of a model, whose parameters are as `like`, and what is around them (see
    `whole_layer.layers_of`), all of it in `roots`; None if one call of `op` cannot run them.
    """
    if not isinstance(like, Tensor) or not like.is_cpu:
        return None
    strange = _strange.get(model)
    if strange is not None and strange.still():
        return None
    layers = whole_layer.layers_of(model, roots, like, layout, lambda: gather(like.dtype), around=True)
    if layers is None or not layers.takes:
        _strange[model] = _Strange(roots)
        return None
    return layers if whole_layer.takes_all(like, layers, op) else None
