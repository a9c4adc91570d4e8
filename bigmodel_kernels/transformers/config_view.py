"""A view of a config that differs in one answer: its attention implementation is "bigmodel".

transformers builds attention masks, and picks the attention function, by `config._attn_implementation`.
Several models may share one config object, and users go on changing it after patching, so neither changing it
nor copying it will do. A view shares the `__dict__` of its base: every other attribute is the same for both,
at all times.
"""

from __future__ import annotations

import copy
from typing import Any

from bigmodel_kernels.transformers.autoregister import NAME

_BASE = "_bigmodel_base"
_INTERNAL = "_attn_implementation_internal"  # where the base keeps it
_SHORT_MASKS = "_bigmodel_short_masks"
_classes: dict[tuple[type, bool], type] = {}


def view(base: Any, short_masks: bool = False) -> Any:
    """A config equal to `base` but for the attention implementation. `short_masks` are for models that would
    ask for full ones.
    """
    cls = type(base)
    if (cls, short_masks) not in _classes:
        namespace = {
            "__slots__": (_BASE,),
            _SHORT_MASKS: short_masks,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            # transformers makes a config of defaults by `type(config)()`: that is a plain one.
            "__new__": lambda _, *args, _cls=cls, **kwargs: _cls(*args, **kwargs),
            "__eq__": _equal,
            "_attn_implementation": property(_implementation, _set_implementation),
            _INTERNAL: property(_internal, _set_internal),
            "__reduce_ex__": _reduce,
            "__deepcopy__": _deepcopy,
        }
        asked = getattr(cls, "output_attentions", None)
        if isinstance(asked, property):  # its setter asks the implementation: the base's is the one to ask
            namespace["output_attentions"] = property(asked.fget, _set_output_attentions)
        _classes[cls, short_masks] = type(cls.__name__, (cls,), namespace)
    result: Any = object.__new__(_classes[cls, short_masks])
    object.__setattr__(result, "__dict__", base.__dict__)
    object.__setattr__(result, _BASE, base)
    return result


def is_view(config: Any) -> bool:
    return type(config) in _classes.values()


def keeps_masks_short(config: Any) -> bool:
    return bool(getattr(config, _SHORT_MASKS, False))


def base_of(config: Any) -> Any:
    """The config behind a view; any other config itself."""
    return object.__getattribute__(config, _BASE) if is_view(config) else config


def _implementation(self: Any) -> str:
    return NAME


def _set_implementation(self: Any, value: Any) -> None:
    object.__getattribute__(self, _BASE)._attn_implementation = value


def _internal(self: Any) -> Any:
    return self.__dict__.get(_INTERNAL)


def _set_internal(self: Any, value: Any) -> None:
    """A model that is made with this config writes back what it reads, which nobody has asked for."""
    if value != NAME:
        self.__dict__[_INTERNAL] = value


def _set_output_attentions(self: Any, value: Any) -> None:
    object.__getattribute__(self, _BASE).output_attentions = value


def _equal(self: Any, other: Any) -> bool:
    return bool(base_of(self) == base_of(other))


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return view, (base_of(self), keeps_masks_short(self))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """A copy of a patched model has a view too; that of the config alone, for another model, is plain."""
    if not memo:
        return copy.deepcopy(base_of(self))
    return view(copy.deepcopy(base_of(self), memo), keeps_masks_short(self))
