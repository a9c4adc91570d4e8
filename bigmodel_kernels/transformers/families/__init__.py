"""Model families: one file each, that says which module class becomes which, with which operators.

A family is loaded when the transformers module that it is about is: a model whose classes were never imported
cannot be in the process. To add one, write its file with a `FAMILY` and name it here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

#: transformers module -> our module.
_FILES = {
    "transformers.models.bert.modeling_bert": "bert",
    "transformers.models.gpt2.modeling_gpt2": "gpt2",
}


@dataclass(frozen=True)
class Rule:
    """Instances of exactly `original` become `patched`, a subclass, unless `check` gives a reason."""

    original: type[nn.Module]
    patched: type[nn.Module]
    ops: tuple[str, ...]
    check: Callable[[nn.Module], str | None]
    note: str = ""


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


@dataclass(frozen=True)
class Family:
    """Everything that patching knows about a family.

    `models` are the classes whose forward makes the attention mask from `self.config`, `mask_path` the ones
    that the mask passes on its way to the attention. Where all modules of `mask_path` are exactly of these
    classes, and the model's forward is its class's own, the config is seen through a view that says
    "bigmodel", so that the mask stays two-dimensional.
    """

    name: str
    rules: tuple[Rule, ...]
    children: tuple[ChildRule, ...] = ()
    models: tuple[type[nn.Module], ...] = ()
    mask_path: tuple[type[nn.Module], ...] = ()
    #: Why the parts of the family that have no rule are left as they are, by class.
    left: dict[type, str] = field(default_factory=dict)


def loaded() -> list[Family]:
    """Families whose transformers module is in the process."""
    return [
        importlib.import_module(f"{__name__}.{ours}").FAMILY
        for theirs, ours in _FILES.items()
        if theirs in sys.modules
    ]
