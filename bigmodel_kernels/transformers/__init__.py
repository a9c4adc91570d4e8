"""The transformers layer: patching whole models, and `attn_implementation="bigmodel"` for every model.

`patch`, `unpatch`, `patched` and `explain` work on a loaded model; `register` names the attention function to
transformers. Importing this package does not import transformers; using what it holds does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigmodel_kernels.transformers.autoregister import register, register_when_imported

if TYPE_CHECKING:
    from bigmodel_kernels.transformers.continuous_batching import enable_continuous_batching
    from bigmodel_kernels.transformers.maps import (
        AttentionMaps,
        LayerAttention,
        attention_maps,
        collect_attention,
    )
    from bigmodel_kernels.transformers.patching import explain, patch, patched, unpatch
    from bigmodel_kernels.transformers.release import release_weights, restore_weights
    from bigmodel_kernels.transformers.report import PatchReport, Row

__all__ = [
    "AttentionMaps",
    "LayerAttention",
    "PatchReport",
    "Row",
    "attention_maps",
    "collect_attention",
    "enable_continuous_batching",
    "explain",
    "patch",
    "patched",
    "register",
    "register_when_imported",
    "release_weights",
    "restore_weights",
    "unpatch",
]

_HOMES = {
    "AttentionMaps": "maps",
    "LayerAttention": "maps",
    "PatchReport": "report",
    "Row": "report",
    "attention_maps": "maps",
    "collect_attention": "maps",
    "enable_continuous_batching": "continuous_batching",
    "explain": "patching",
    "patch": "patching",
    "patched": "patching",
    "release_weights": "release",
    "restore_weights": "release",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
