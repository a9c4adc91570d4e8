"""A view of a config that differs in one answer: its attention implementation is "bigmodel".

transformers builds attention masks, and picks the attention function, by `config._attn_implementation`.
Several models may share one config object, and users go on changing it after patching, so neither changing it
nor copying it will do. A view shares the `__dict__` of its base: every other attribute is the same for both,
at all times.

The views of a model are of one company. Where one of its modules gets its config back, that module reads the
masks of its own implementation only, and from then on the others' views answer as their bases do: small masks
are for a model of which everybody can read them.
"""

from __future__ import annotations

import copy
from typing import Any

from bigmodel_kernels.transformers.autoregister import NAME

_BASE, _COMPANY = "_bigmodel_base", "_bigmodel_company"
_INTERNAL = "_attn_implementation_internal"  # where the base keeps it
_SHORT_MASKS = "_bigmodel_short_masks"
#: Class of a config, and whether masks are short -> that of its views.
_classes: dict[tuple[type, bool], type] = {}
_broken_up: dict[type, type] = {}  # of views whose company has broken up


class Company:
    """The views of a model. Its copy, and what pickle makes of it, has the copies of these."""

    def __init__(self) -> None:
        self.views: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Company, ()


def view(base: Any, company: Company | None = None, short_masks: bool = False) -> Any:
    """A config equal to `base` but for the attention implementation, until its company breaks up.
    `short_masks` are for models that would ask for full ones.
    """
    cls = type(base)
    if (cls, short_masks) not in _classes:
        namespace: dict[str, Any] = {
            _SHORT_MASKS: short_masks,
            "_attn_implementation": property(_implementation, _set_implementation),
            _INTERNAL: property(_internal, _set_internal),
        }
        asked = getattr(cls, "output_attentions", None)
        if isinstance(asked, property):  # its setter asks the implementation: the base's is the one to ask
            namespace["output_attentions"] = property(asked.fget, _set_output_attentions)
        _classes[cls, short_masks] = _subclass(
            cls, **namespace, __reduce_ex__=_reduce, __deepcopy__=_deepcopy
        )
        _broken_up[cls] = _subclass(cls, __reduce_ex__=_reduce_to_base, __deepcopy__=_deepcopy_of_base)
    company = company or Company()
    result: Any = object.__new__(_classes[cls, short_masks])
    object.__setattr__(result, "__dict__", base.__dict__)
    object.__setattr__(result, _BASE, base)
    object.__setattr__(result, _COMPANY, company)
    company.views.append(result)
    return result


def _subclass(cls: type, **namespace: Any) -> type:
    return type(
        cls.__name__,
        (cls,),
        {
            "__slots__": (_BASE, _COMPANY),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            # transformers makes a config of defaults by `type(config)()`: that is a plain one.
            "__new__": lambda _, *args, **kwargs: cls(*args, **kwargs),
            "__eq__": _equal,
            **namespace,
        },
    )


def is_view(config: Any) -> bool:
    """Also one whose company has broken up."""
    return is_complete(config) or type(config) in _broken_up.values()


def is_complete(config: Any) -> bool:
    """Whether it is a view that answers for small masks: its company has not broken up."""
    return type(config) in _classes.values()


def keeps_masks_short(config: Any) -> bool:
    return bool(getattr(config, _SHORT_MASKS, False))


def base_of(config: Any) -> Any:
    """The config behind a view; any other config itself."""
    return object.__getattribute__(config, _BASE) if is_view(config) else config


def leave(config: Any) -> Any:
    """The config behind a view that is given up, with which its company breaks up."""
    company: Company = object.__getattribute__(config, _COMPANY)
    for each in company.views:
        # Not an answer that is looked up at each call: torch.compile reads a class, and guards it.
        object.__setattr__(each, "__class__", _broken_up[type(base_of(each))])
    company.views.clear()
    return base_of(config)


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
    return view, (base_of(self), object.__getattribute__(self, _COMPANY), keeps_masks_short(self))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """A copy of a patched model has a view too; that of the config alone, for another model, is plain."""
    if not memo:
        return copy.deepcopy(base_of(self))
    return view(*(copy.deepcopy(part, memo) for part in _reduce(self, None)[1]))


def _reduce_to_base(self: Any, protocol: Any) -> tuple[Any, ...]:
    return base_of, (base_of(self),)


def _deepcopy_of_base(self: Any, memo: dict[int, Any]) -> Any:
    return copy.deepcopy(base_of(self), memo)
