"""A view of a config that differs in one answer: its attention implementation is "bigmodel".

transformers builds attention masks, and picks the attention function, by `config._attn_implementation`.
Several models may share one config object, and users go on changing it after patching, so neither changing it
nor copying it will do. A view shares the `__dict__` of its base: every other attribute is the same for both,
at all times.

The views of a model are of one company. Where one of its modules gets its config back, that module reads the
masks of its own implementation only, and from then on the others' views answer as their bases do: small masks
are for a model of which everybody can read them.

A view is for its model alone: who makes another model with it gets what its base says (see `_hand_over`).
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from bigmodel_kernels.transformers.autoregister import NAME

_SLOTS = ("_bigmodel_base", "_bigmodel_company", "_bigmodel_owner")
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

    def break_up(self) -> None:
        for each in self.views:
            _break_up(each)
        self.views.clear()


def view(base: Any, company: Company | None = None, short_masks: bool = False, owner: Any = None) -> Any:
    """A config equal to `base` but for the attention implementation, until its company breaks up.
    `short_masks` are for models that would ask for full ones, `owner` is the module whose config it becomes.
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
    result._bigmodel_base = base
    result._bigmodel_company = company
    result._bigmodel_owner = None if owner is None else weakref.ref(owner)
    company.views.append(result)
    return result


def _subclass(cls: type, **namespace: Any) -> type:
    return type(
        cls.__name__,
        (cls,),
        {
            "__slots__": _SLOTS,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            # transformers makes a config of defaults by `type(config)()`: that is a plain one.
            "__new__": lambda _, *args, **kwargs: cls(*args, **kwargs),
            "__eq__": _equal,
            "__copy__": _copy,
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
    return config._bigmodel_base if is_view(config) else config


def in_one_company(one: Any, other: Any) -> bool:
    """Whether both were made as views of one model: of one module, one is the other or took its place."""
    return is_view(one) and is_view(other) and one._bigmodel_company is other._bigmodel_company


def leave(config: Any) -> Any:
    """The config behind a view that is given up, with which its company breaks up."""
    if is_complete(config):  # one that was handed over is of no company any more
        config._bigmodel_company.break_up()
    return base_of(config)


def _break_up(config: Any) -> None:
    # Not an answer that is looked up at each call: torch.compile reads a class, and guards it.
    object.__setattr__(config, "__class__", _broken_up[type(base_of(config))])


def _hand_over(config: Any) -> None:
    """Another model is being made with a view. That model keeps the object, which from now on answers as its
    base; the owner gets a new view in its place. Where that is unknown (pickle does not keep it) or has
    another config by now, its company breaks up: right in any case, but masks are full again.
    """
    company: Company = config._bigmodel_company
    owner = config._bigmodel_owner and config._bigmodel_owner()
    if owner is None or owner.__dict__.get("config") is not config:
        company.break_up()
        return
    owner.__dict__["config"] = view(base_of(config), company, keeps_masks_short(config), owner)
    company.views[:] = (each for each in company.views if each is not config)
    _break_up(config)


def _implementation(self: Any) -> str:
    return NAME


def _set_implementation(self: Any, value: Any) -> None:
    base_of(self)._attn_implementation = value


def _internal(self: Any) -> Any:
    return self.__dict__.get(_INTERNAL)


def _set_internal(self: Any, value: Any) -> None:
    """The constructor of a model writes back what it has read, which nobody has asked for."""
    if value == NAME:
        _hand_over(self)
    else:
        self.__dict__[_INTERNAL] = value


def _set_output_attentions(self: Any, value: Any) -> None:
    base_of(self).output_attentions = value


def _equal(self: Any, other: Any) -> bool:
    return bool(base_of(self) == base_of(other))


def _copy(self: Any) -> Any:
    """The copy of a config is for another model, and plain."""
    return copy.copy(base_of(self))


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return view, (base_of(self), self._bigmodel_company, keeps_masks_short(self))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """A copy of a patched model has a view too; that of the config alone, for another model, is plain."""
    if not memo:
        return copy.deepcopy(base_of(self))
    owner = self._bigmodel_owner and self._bigmodel_owner()
    base, company = (copy.deepcopy(part, memo) for part in (base_of(self), self._bigmodel_company))
    return view(base, company, keeps_masks_short(self), memo.get(id(owner)))


def _reduce_to_base(self: Any, protocol: Any) -> tuple[Any, ...]:
    return base_of, (base_of(self),)


def _deepcopy_of_base(self: Any, memo: dict[int, Any]) -> Any:
    return copy.deepcopy(base_of(self), memo)
