"""A view of a config that differs in one answer: its attention implementation is "bigmodel".

transformers builds attention masks, and picks the attention function, by `config._attn_implementation`.
Several models may share one config object, and users go on changing it after patching, so neither changing it
nor copying it will do. A view shares the `__dict__` of its base: every other attribute is the same for both,
at all times.

The views of a model are of one company. Where one of its modules has its own config back, that module reads
the masks of its own implementation, and the others answer that too: small masks are for a model of which
everybody can read them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from bigmodel_kernels.transformers.autoregister import NAME

_BASE, _COMPANY = "_bigmodel_base", "_bigmodel_company"
_classes: dict[type, type] = {}


@dataclass
class Company:
    """What the views of a model share."""

    complete: bool = True


def view(base: Any, company: Company | None = None) -> Any:
    """A config equal to `base` but for the attention implementation, as long as its company is complete."""
    cls = type(base)
    if cls not in _classes:
        namespace = {
            "__slots__": (_BASE, _COMPANY),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            # transformers makes a config of defaults by `type(config)()`: that is a plain one.
            "__new__": lambda _, *args, _cls=cls, **kwargs: _cls(*args, **kwargs),
            "__eq__": _equal,
            "_attn_implementation": property(_implementation, _set_implementation),
            "__reduce_ex__": _reduce,
            "__deepcopy__": _deepcopy,
        }
        asked = getattr(cls, "output_attentions", None)
        if isinstance(asked, property):  # its setter asks the implementation: the base's is the one to ask
            namespace["output_attentions"] = property(asked.fget, _set_output_attentions)
        _classes[cls] = type(cls.__name__, (cls,), namespace)
    result: Any = object.__new__(_classes[cls])
    object.__setattr__(result, "__dict__", base.__dict__)
    object.__setattr__(result, _BASE, base)
    object.__setattr__(result, _COMPANY, company or Company())
    return result


def is_view(config: Any) -> bool:
    return type(config) in _classes.values()


def base_of(config: Any) -> Any:
    """The config behind a view; any other config itself."""
    return object.__getattribute__(config, _BASE) if is_view(config) else config


def is_complete(config: Any) -> bool:
    """Whether it is a view, and none of its company has left."""
    return is_view(config) and _company_of(config).complete


def leave(config: Any) -> Any:
    """The config behind a view that is given up, and with it the small masks of all of its company."""
    _company_of(config).complete = False
    return base_of(config)


def _company_of(config: Any) -> Company:
    company: Company = object.__getattribute__(config, _COMPANY)
    return company


def _implementation(self: Any) -> Any:
    return NAME if _company_of(self).complete else base_of(self)._attn_implementation


def _set_implementation(self: Any, value: Any) -> None:
    object.__getattribute__(self, _BASE)._attn_implementation = value


def _set_output_attentions(self: Any, value: Any) -> None:
    object.__getattribute__(self, _BASE).output_attentions = value


def _equal(self: Any, other: Any) -> bool:
    return bool(base_of(self) == base_of(other))


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return view, (base_of(self), _company_of(self))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    return view(copy.deepcopy(base_of(self), memo), copy.deepcopy(_company_of(self), memo))
