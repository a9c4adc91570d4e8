"""Registers the attention function with transformers as soon as transformers' models can be imported, and not
before.

`import bigmodel_kernels` must not import transformers (seconds, hundreds of modules), yet after it
`AutoModel.from_pretrained(path, attn_implementation="bigmodel")` must work in whatever order the two were
imported. Every model goes through `transformers.modeling_utils`. If that module is there already, we register
at once; otherwise a finder on `sys.meta_path` waits for it, lets the ordinary finders locate it, registers
after its code has run, and is gone. `register()` does the same explicitly, importing transformers if needed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

NAME = "bigmodel"
#: The same functions under the name that a model has while it runs in transformers' continuous batching,
#: which takes names with "flash" in them for attention without dense masks (see continuous_batching.py).
#: `from_pretrained` and `set_attn_implementation` refuse it: they look for a package behind such a name.
FLASH_NAME = "bigmodel_flash"
_WATCHED = "transformers.modeling_utils"


def register() -> None:
    """Makes `attn_implementation="bigmodel"` known to transformers. Calling it again changes nothing.

    Raises ImportError when transformers is missing or has no attention interface (before 5.0).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from bigmodel_kernels.transformers.attention_interface import attention_forward, attention_mask

    for name in (NAME, FLASH_NAME):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)


def register_when_imported() -> None:
    """Registers now if transformers' models are imported, else right after they are."""
    module = sys.modules.get(_WATCHED)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds nothing itself: it adds one step after the loading of `transformers.modeling_utils`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
