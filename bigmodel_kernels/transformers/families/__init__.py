"""Model families: one file each, that says which module class becomes which, with which operators.

`families/<name>.py` is about `transformers.models.<name>.modeling_<name>`, and is loaded when that module is:
a model whose classes were never imported cannot be in the process. To add a family, write its file with a
`FAMILY`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Rule:
    """Instances of exactly `original` become `patched`, a subclass, unless `check` gives a reason.

    `projections` names the submodules that may be LoRA's: they are called as they are, the rest is fused.
    """

    original: type[nn.Module]
    patched: type[nn.Module]
    ops: tuple[str, ...]
    check: Callable[[nn.Module], str | None]
    note: str = ""
    projections: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChildRule:
    """The same for a module known by its place, `parent.attribute` (dotted): generic ones (nn.Linear,
    nn.LayerNorm), and those that need another class there than elsewhere. Goes before a `Rule`."""

    parent: type[nn.Module]
    attribute: str
    original: type[nn.Module]
    patched: type[nn.Module]
    ops: tuple[str, ...]
    check: Callable[[nn.Module], str | None] | None = None
    note: str = ""
    projections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Everything that patching knows about a family.

    `models` are the classes whose forward makes the attention mask from `self.config`, `mask_path` the ones
    that the mask passes on its way to the attention; none for models that make masks in a way of their own.
    Where all modules of `mask_path` are exactly of these classes, and the model's forward is its class's own,
    the config is seen through a view that says "bigmodel", so that the mask stays two-dimensional.
    `reads_masks_patched` are those of them that read such a mask only in their patched form, because their
    own code does not call transformers' attention interface: then all of these must be patched.
    `asks_for_full_masks`: the model wants masks of four dimensions, which its patched attention has
    no need of.
    """

    name: str
    rules: tuple[Rule, ...]
    children: tuple[ChildRule, ...] = ()
    #: Models whose loss can do without logits; only for `patch(model, fused_loss=True)`.
    losses: tuple[Rule, ...] = ()
    models: tuple[type[nn.Module], ...] = ()
    mask_path: tuple[type[nn.Module], ...] = ()
    reads_masks_patched: tuple[type[nn.Module], ...] = ()
    asks_for_full_masks: bool = False
    #: Why the parts of the family that have no rule are left as they are, by class.
    left: dict[type, str] = field(default_factory=dict)


def loaded() -> list[Family]:
    """Families whose transformers module is in the process, and has what their file names."""
    return [family for family in _loaded().values() if isinstance(family, Family)]


def unfit() -> dict[str, str]:
    """Transformers modules in the process that lack what their family names, and the reason.

    Another version has renamed or dropped it.
    """
    return {
        _module(name): f"the family {name} does not fit this version of transformers: {problem}"
        for name, problem in _loaded().items()
        if isinstance(problem, str)
    }


def _loaded() -> dict[str, Family | str]:
    found = {name: _load(name) for name in names() if _module(name) in sys.modules}
    return {name: home if isinstance(home, str) else home.FAMILY for name, home in found.items()}


def _module(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


@functools.cache
def _load(name: str) -> Any:
    """The family's module, or what its transformers module has not."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except (AttributeError, ImportError) as error:
        return str(error)


@functools.cache
def names() -> tuple[str, ...]:
    """Those that there are, by the names of transformers' modules."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
