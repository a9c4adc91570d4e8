"""The public functions of flash-attention 2 (package `flash_attn`), computed by our operators on CPU and GPU.

A package of the same shape, so that an import of `flash_attn` becomes one of
`bigmodel_kernels.compat.flash_attn` and the code behind it stays as it is:

    from bigmodel_kernels.compat.flash_attn import flash_attn_func, flash_attn_with_kvcache
    from bigmodel_kernels.compat.flash_attn.bert_padding import pad_input, unpad_input

Code that cannot be changed finds it under the name `flash_attn` after `install()`.

Signatures: https://github.com/Dao-AILab/flash-attention, version 2.8.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from bigmodel_kernels.compat.flash_attn import bert_padding, flash_attn_interface
from bigmodel_kernels.compat.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from bigmodel_kernels.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

#: The version of flash-attention whose signatures these are; the local part says who computes.
__version__ = "2.8.0+bigmodel"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "install",
    "pad_input",
    "uninstall",
    "unpad_input",
]


def install() -> None:
    """Makes this package importable as `flash_attn`, in this process, until `uninstall`. Twice is once.

    Nothing else calls this. Libraries that ask for the metadata of an installed distribution (transformers'
    is_flash_attn_2_available) do not find one.

    Raises RuntimeError where another package of that name is imported or can be: it is not put out of place.
    """
    if sys.modules.get("flash_attn") is sys.modules[__name__]:
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError("flash_attn is a package of its own here, and install() does not hide it")
    sys.modules.update(_names())


def uninstall() -> None:
    """Takes `install` back; what was imported meanwhile stays with who imported it."""
    for name, module in _names().items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _names() -> dict[str, ModuleType]:
    return {
        "flash_attn": sys.modules[__name__],
        "flash_attn.flash_attn_interface": flash_attn_interface,
        "flash_attn.bert_padding": bert_padding,
    }
